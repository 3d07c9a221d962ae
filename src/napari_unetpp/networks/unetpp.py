"""UNet++: nested, dense skip connections and a head at every depth."""

from __future__ import annotations

from napari_unetpp.networks.unet import Node, UNet


class UNetPlusPlus(UNet):
    """UNet++: X^{i,j} reads all X^{i,0..j-1} and the upsampled X^{i+1,j-1}.

    Parameters
    ----------
    config : NetConfig
        "unet++"; with `deep_supervision` there are heads at the depths 1 to levels.

    Notes
    -----
    The nodes of depth d are those with i + j <= d, and no other, so a network cut
    at a depth is a network of its own (`prune`). As in the authors' code, the
    up-convolution has a bias and no activation, dropout follows each convolution, and
    blocks read [up, X^{i,0}, X^{i,1}, ...] (the paper's formula names the skips first).

    References
    ----------
    .. [1] Zhou et al., UNet++, DLMIA 2018, :DOI:`10.1007/978-3-030-00889-5_1`
    .. [2] Zhou et al., UNet++: Redesigning Skip Connections, IEEE TMI 2020,
           :DOI:`10.1109/TMI.2019.2959609`
    """

    def nodes(self, depth: int) -> list[Node]:
        """Return the nodes (i, j) that X^{0,depth} needs, in computable order."""
        return [(d - j, j) for d in range(depth + 1) for j in range(d + 1)]

    def skips(self, i: int, j: int) -> list[Node]:
        """Return the nodes of level `i` that X^{i,j} reads besides the one below."""
        return [(i, k) for k in range(j)]

    def _head_depths(self) -> tuple[int, ...]:
        deepest = self.config.levels
        return tuple(range(1 if self.config.deep_supervision else deepest, deepest + 1))
