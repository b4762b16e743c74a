"""Maps that depend on the neighbourhood of a voxel: a small convolutional head on features that stay as they are."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from brainfm_monai.networks.residual import NEGATIVE_SLOPE
from brainfm_monai.tasks import TaskLayout

DILATIONS = (1, 2, 4)  # of the convolutions: a voxel sees 7 voxels to each side, 14 mm at 2 mm
PRIOR = -4.0  # logit of a mask before training: a mask covers 2 % of a scan


class ContextHead(nn.Module):
    """Maps of some tasks on the backbone's grid, out of the features and the image.

    A 1x1x1 convolution narrows the features, and dilated 3x3x3 convolutions with skips look at the neighbourhood. So a
    task that a linear head cannot solve (lesions: bright spots that are neither sulci nor ventricles) is learnt on a
    frozen backbone, and no other map changes. Nothing is normalised over the volume.

    Args:
        features: channels of the backbone's output.
        layout: names of the channels of the maps.
        tasks: tasks of the layout.
        width: channels between the convolutions.

    Reference:
        Yu and Koltun, Multi-scale context aggregation by dilated convolutions, ICLR 2016.
    """

    def __init__(self, features: int, layout: TaskLayout, tasks: Sequence[str], width: int = 24) -> None:
        super().__init__()
        self.narrow = nn.Conv3d(features, width, kernel_size=1)
        self.see = nn.Conv3d(1, width, kernel_size=1, bias=False)
        self.convs = nn.ModuleList(nn.Conv3d(width, width, 3, padding=d, dilation=d) for d in DILATIONS)
        self.activation = nn.LeakyReLU(NEGATIVE_SLOPE)
        rows = [layout.tasks[name] for name in tasks]
        priors = [PRIOR if task.kind == "mask" else 0.0 for task in rows for _ in range(task.channels)]
        self.last = nn.Conv3d(width, len(priors), kernel_size=1)
        assert self.last.bias is not None
        self.last.bias.data.copy_(torch.tensor(priors))

    def forward(self, features: Tensor, image: Tensor) -> Tensor:
        """Map features (B, C, h, w, d) and the image on their grid, (B, 1, h, w, d), to (B, channels, h, w, d)."""
        x = self.activation(self.narrow(features) + self.see(image))
        for conv in self.convs:
            x = x + self.activation(conv(x))
        return self.last(x).float()
