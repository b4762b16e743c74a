"""What the values of a scan say: CT or MR, the padding around it, and what speaks against a scan of a head."""

from dataclasses import replace

import numpy as np

from brainfm_monai import io
from brainfm_monai.tasks import BRAIN_WINDOW_HU

SAMPLES = 500_000  # voxels that are looked at
AIR_HU = -900.0  # and below: air, and what scanners pad with
FAT_HU, EDGE_HU = (-150.0, -30.0), (-800.0, -300.0)  # fat; voxels that are part air, of which a CT has few
NEGATIVE_HU, WATER_HU, BONE_HU = (-200.0, -10.0), (-30.0, 100.0), (300.0, 3100.0)
# Shares in the CT template of the clinical toolbox: air 0.35; of the head -200 to -10 HU 0.21, water 0.70, bone 0.07;
# fat is 8 times as frequent per HU as edges. In MR scans padded with -1024, also resampled ones: -200 to -10 0.01 at
# most.
MINIMUM_AIR, MINIMUM_NEGATIVE, MINIMUM_WATER, BONE_RANGE = 0.02, 0.03, 0.3, (0.01, 0.4)
FAT_PER_EDGE = 2.0
# Of a CT that was clipped at 0: air, and of the rest brain and muscle; none of 64 MR scans of the open sets is like it
MINIMUM_CLIPPED_AIR, TISSUE_HU, MINIMUM_TISSUE = 0.2, (10.0, 90.0), 0.5
# Stored numbers without their intercept: 1024 or 1000 above HU. A T1 whose white matter is as bright as such water
# could pass for one; but of its head at most 0.21 is within the brain's window, of the CT template 0.60.
# Where the lowest number was subtracted, that is the padding of a scanner, -2000, -2048, -3024 or -8192.
OFFSETS_HU, MINIMUM_BRAIN = (1024.0, 1000.0, 2000.0, 2048.0, 3024.0, 8192.0), 0.3
SIGN_BIT = 2**15  # numbers of 16 bits whose sign was lost are larger
# Share of a CT within the brain's window, 1 HU off its ends: a head in a field of 50 cm has 0.03
MINIMUM_CONTRAST = 0.005
MINIMUM_PADDING = 0.01  # share of voxels of the one lowest value
# of the one highest value: a mark that is written into the picture; fewer than 0.001 do not change the scale
MINIMUM_FILLED = 0.0005
FAR_BELOW = 0.5  # of the range from the 1st to the 99th percentile, by which damaged voxels lie below it
LARGEST_NEGATIVE = 0.05  # share of other negative values in a magnitude image, at the edges of its padding
FILL_RATIO = 2.0  # of padding above and the brightest of all other voxels: at most 1.6 in scans of the open sets
# Of voxels that are not background, the share with the value of their neighbour is 0.22 at most in 30 scans, 0.78 and
# more in label maps and masks; that of the highest 2 % of the values is 0.018 at most. The darkest side of a scan has
# the least of its values; in phase images it has half of the range.
LABELS_SHARE, NEAR_TOP, CLIPPED_SHARE, DARK_SIDE = 0.6, 0.98, 0.05, 0.3
DEEP = 0.1  # of the highest value: below, negative values are those of an interpolation
PLANES = 32  # that are looked at


def decide_modality(volume: io.Volume, asked: str = "auto") -> tuple[str, str]:
    """Decide whether a scan is a CT in Hounsfield units, which is clipped to the brain's window before the network.

    A CT has air, water and bone where Hounsfield put them, and fat between air and water, where no magnitude image of
    MR has anything. ``asked`` decides if it is not ``"auto"``, else the file's header if it says, else the values.
    Returns ``"mr"`` or ``"ct"``, and the reason.
    """
    if asked != "auto":
        return asked, "as asked by --modality"
    if volume.modality:
        return volume.modality, "the DICOM header says so"
    is_ct, found, _ = _judge_hounsfield(_sample(volume.values))
    if is_ct:
        return "ct", f"the values are those of Hounsfield units: {found}"
    return "mr", "the values are not those of Hounsfield units" + (f": {found}" if not found.startswith("0%") else "")


def _sample(values: np.ndarray) -> np.ndarray:
    flat = values.reshape(-1)
    return flat[:: max(1, len(flat) // SAMPLES)].astype(np.float64)


def _share(values: np.ndarray, low: float, high: float) -> float:
    return float(((values >= low) & (values < high)).mean()) if len(values) else 0.0


def _judge_hounsfield(values: np.ndarray) -> tuple[bool, str, float]:
    """Whether values are those of a CT in Hounsfield units, the shares that decide, and that of the brain's window."""
    air, head = float((values <= AIR_HU).mean()), values[values > NEGATIVE_HU[0]]
    negative, water, bone, brain = (_share(head, *ends) for ends in (NEGATIVE_HU, WATER_HU, BONE_HU, BRAIN_WINDOW_HU))
    fat, edge = (_share(values, low, high) / (high - low) for low, high in (FAT_HU, EDGE_HU))
    is_ct = air >= MINIMUM_AIR and negative >= MINIMUM_NEGATIVE and fat >= FAT_PER_EDGE * edge
    is_ct = is_ct and water >= MINIMUM_WATER and BONE_RANGE[0] <= bone <= BONE_RANGE[1]
    text = f"{air:.0%} air, and of the head {negative:.0%} from -200 to -10, {water:.0%} water, {bone:.0%} bone"
    return is_ct, text, brain


def _is_clipped_ct(values: np.ndarray) -> bool:
    """Whether values are those of Hounsfield units from 0 on: much air, and of the rest much soft tissue, and bone."""
    if values.min() < 0 or (values == 0).mean() < MINIMUM_CLIPPED_AIR:
        return False
    tissue, bone = (_share(values[values > 0], *ends) for ends in (TISSUE_HU, BONE_HU))
    return tissue >= MINIMUM_TISSUE and BONE_RANGE[0] <= bone <= BONE_RANGE[1]


def mend_hounsfield(volume: io.Volume, asked: str = "auto") -> io.Volume:
    """A CT whose file lost the intercept or the sign of its numbers, in Hounsfield units, with a warning."""
    sample = _sample(volume.values)
    if asked == "mr" or volume.modality == "mr" or _judge_hounsfield(sample)[0]:
        return volume
    judged = {offset: _judge_hounsfield(sample - offset)[::2] for offset in OFFSETS_HU}
    offset = max(judged, key=lambda o: judged[o])
    if judged[offset][0] and judged[offset][1] >= MINIMUM_BRAIN:
        done = f"{offset:g} above Hounsfield units: {offset:g} is subtracted"
        mended = volume.values - np.float32(offset)
    elif sample.min() >= 0 and _judge_hounsfield(np.where(sample >= SIGN_BIT, sample - 2 * SIGN_BIT, sample))[0]:
        done = f"whose negative numbers lost their sign: {2 * SIGN_BIT} is subtracted from them"
        mended = np.where(volume.values >= SIGN_BIT, volume.values - np.float32(2 * SIGN_BIT), volume.values)
    else:
        return volume
    warning = f"the values are those of a CT {done} (--modality mr: no CT)"
    return replace(volume, values=mended, warnings=(*volume.warnings, warning))


def remove_padding(values: np.ndarray) -> tuple[np.ndarray, float, str]:
    """An MR scan, (H, W, D), without what pads it, and the value that it is clipped to because of damaged voxels.

    Below: a negative value that many voxels share, where hardly another is negative; or a few negative values far below
    all others, which would take the range of the rest. Above: a value that many voxels share, far from all others; such
    voxels become background, 0. Returns the scan, its lowest value, infinite without padding, and a warning or nothing.
    """
    low, high = float(values.min()), float(values.max())
    padded = float((values == low).mean()) if low < 0 else 0.0
    if padded >= MINIMUM_PADDING and float((values < 0).mean()) - padded <= LARGEST_NEGATIVE * (1 - padded):
        found = f"{padded:.0%} of the voxels are {low:g}"
        return values, 0.0, f"{found}: taken for padding of an MR scan and set to 0 (--modality ct: a CT)"
    filled = float((values == high).mean())
    if filled >= MINIMUM_FILLED:
        second = float(values[values < high].max())
        if second > max(low, 0.0) and high >= FILL_RATIO * second:
            found = f"{filled:.1%} of the voxels are {high:g}: taken for padding of a scan and set to 0"
            return np.where(values > second, np.float32(0), values), -np.inf, found
    first, last = np.quantile(_sample(values), [0.01, 0.99])
    limit = first - FAR_BELOW * (last - first)
    if low < min(0.0, limit):
        found = f"{int((values < limit).sum())} voxels lie far below all others, down to {low:g}, and become {first:g}"
        return values, float(first), f"{found}: damaged, or large numbers that lost their sign?"
    return values, -np.inf, ""


def find_doubts(values: np.ndarray, modality: str) -> list[str]:
    """What speaks against a magnitude scan or a CT of a head in values, (H, W, D), after padding: one sentence each."""
    planes = values[:, :, :: max(1, values.shape[2] // PLANES)]
    distinct, counts = np.unique(planes[:: max(1, planes.shape[0] // PLANES)], return_counts=True)
    front = planes != distinct[counts.argmax()]
    same = front[1:] & (np.diff(planes, axis=0) == 0)
    if same.sum() > LABELS_SHARE * front[1:].sum() > 0:
        share = same.sum() / front[1:].sum()
        return [f"{share:.0%} of the voxels have the value of their neighbour: a label map or a mask, and no scan?"]
    if modality == "ct":
        low, high = BRAIN_WINDOW_HU
        inside = float(((values > low + 1) & (values < high - 1)).mean())
        rule = f"hardly a voxel is within the brain's window of {low:g} to {high:g} HU"
        return [] if inside >= MINIMUM_CONTRAST else [f"{rule} ({inside:.1%}): are these Hounsfield units?"]
    sample = _sample(values)
    if _is_clipped_ct(sample):
        return ["the values are those of a CT without its negative numbers: if it is one, pass --modality ct"]
    low, high = np.quantile(sample, [0.01, 0.99])
    side = min(float(np.median(values.take(end, axis=axis))) for axis in range(3) for end in (0, -1))
    if side - low > DARK_SIDE * (high - low):
        kinds = "a phase image, an inverted contrast or standardised values?"
        return [f"no side of the volume is dark, as the air around a head is in a magnitude image: {kinds}"]
    if low < -DEEP * high:
        kinds = "standardised values, a phase image or a CT in another unit?"
        return [f"values reach from {low:.4g} to {high:.4g}, where a magnitude image begins at 0: {kinds}"]
    clipped = float((planes >= NEAR_TOP * planes.max()).sum() / max(1, int(front.sum())))
    text = f"the highest values have a share of {clipped:.0%}: clipped values, a mask or a probability map?"
    return [text] if clipped > CLIPPED_SHARE else []
