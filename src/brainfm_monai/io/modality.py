"""Whether a scan is a CT in Hounsfield units: by its header, by its values, or as asked; and the padding of an MR scan."""

from __future__ import annotations

import numpy as np

from brainfm_monai.io.volumes import Volume

MODALITIES = ("auto", "mr", "ct")
SAMPLES = 500_000  # voxels that are looked at
AIR_HU = -900.0  # and below: air, and what scanners pad with
FAT_HU, EDGE_HU = (-150.0, -30.0), (-800.0, -300.0)  # fat; voxels that are part air, of which a CT has few
NEGATIVE_HU, WATER_HU, BONE_HU = (-200.0, -10.0), (-30.0, 100.0), (300.0, 3100.0)
# Shares in the CT template of the clinical toolbox: air 0.35; of the head -200 to -10 HU 0.21, water 0.70, bone 0.07; fat is 8
# times as frequent per HU as edges. In MR scans padded with -1024, also resampled ones: -200 to -10 0.01 at most.
MINIMUM_AIR, MINIMUM_NEGATIVE, MINIMUM_WATER, BONE_RANGE = 0.02, 0.03, 0.3, (0.01, 0.4)
FAT_PER_EDGE = 2.0
MINIMUM_PADDING = 0.01  # share of voxels of the one lowest value
LARGEST_NEGATIVE = 0.05  # share of other negative values in a magnitude image, at the edges of its padding


def parse_modality(asked: str) -> str:
    """Check the name of a modality: ``auto``, ``mr`` or ``ct``.

    Raises:
        ValueError: if it is none of these.
    """
    if asked not in MODALITIES:
        raise ValueError(f"modality: one of {', '.join(MODALITIES)} is needed, found {asked!r}")
    return asked


def decide_modality(volume: Volume, asked: str = "auto") -> tuple[str, str]:
    """Decide whether a scan is a CT in Hounsfield units, which is clipped to the brain's window before the network.

    A CT has air, water and bone where Hounsfield put them, and fat between air and water, where no magnitude image of MR has
    anything.

    Args:
        volume: the scan.
        asked: ``"mr"`` or ``"ct"`` decides; ``"auto"``: the file's header if it says, else the values.

    Returns:
        ``"mr"`` or ``"ct"``, and the reason.
    """
    if asked != "auto":
        return asked, "as asked by --modality"
    if volume.modality:
        return volume.modality, "the DICOM header says so"
    values = volume.values.reshape(-1)
    values = values[:: max(1, len(values) // SAMPLES)]
    head = values[values > NEGATIVE_HU[0]]

    def share(part: np.ndarray, limits: tuple[float, float]) -> float:
        return float(((part >= limits[0]) & (part < limits[1])).mean()) if len(part) else 0.0

    air = float((values <= AIR_HU).mean())
    negative, water, bone = (share(head, limits) for limits in (NEGATIVE_HU, WATER_HU, BONE_HU))
    fat, edge = (share(values, limits) / (limits[1] - limits[0]) for limits in (FAT_HU, EDGE_HU))
    found = f"{air:.0%} air, and of the head {negative:.0%} from -200 to -10, {water:.0%} water, {bone:.0%} bone"
    is_ct = air >= MINIMUM_AIR and negative >= MINIMUM_NEGATIVE and fat >= FAT_PER_EDGE * edge
    is_ct = is_ct and water >= MINIMUM_WATER and BONE_RANGE[0] <= bone <= BONE_RANGE[1]
    if is_ct:
        return "ct", f"the values are those of Hounsfield units: {found}"
    return "mr", "the values are not those of Hounsfield units" + (f": {found}" if air >= MINIMUM_AIR else "")


def find_floor(values: np.ndarray) -> tuple[float, str]:
    """The padding of a magnitude image: one negative value that many voxels share, where hardly another voxel is negative.

    Args:
        values: MR scan, shape (H, W, D).

    Returns:
        The value below which voxels are lifted, and a warning; minus infinity and an empty string without padding.
    """
    lowest = float(values.min())
    padded = float((values == lowest).mean()) if lowest < 0 else 0.0
    if padded < MINIMUM_PADDING or float((values < 0).mean()) - padded > LARGEST_NEGATIVE * (1 - padded):
        return -np.inf, ""
    return (
        0.0,
        f"{padded:.0%} of the voxels are {lowest:g}: taken for padding of an MR scan and set to 0 (--modality ct: a CT)",
    )
