"""Commands that make training subjects, and scans to try things on."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["demo_scans", "list_subjects", "prepare_labels"]


def demo_scans(output: str) -> None:
    """Write the demo's scans: the MNI152 T1, and a clinical scan simulated from it.

    Args:
        output: folder for the scans.
    """
    from brainfm_monai.data.demo import write_demo_scans

    write_demo_scans(str(output))


def prepare_labels(
    input: str,
    output: str,
    jobs: int = 1,
    overwrite: bool = False,
    protocol: str = "synthseg_head",
    size: Sequence[int] = (192, 224, 224),
) -> None:
    """Prepare subjects for training from label maps; finished ones are skipped.

    Args:
        input: folder of label maps with FreeSurfer ids, or one of them.
        output: folder for the prepared subjects, one folder each.
        jobs: subjects that are prepared at once; each needs about 3 GB.
        overwrite: prepare finished subjects again.
        protocol: label protocol of the segmentation: a name or a table file.
        size: box around the brain, in voxels of 1 mm.
    """
    from brainfm_monai.data.prepare import PreparationError, prepare_label_maps

    try:
        prepare_label_maps(str(input), str(output), protocol=protocol, spatial_size=size, jobs=jobs, overwrite=overwrite)
    except PreparationError as error:
        raise SystemExit(str(error)) from error


def list_subjects(root: str, validation: Sequence[str] | str = (), validation_fraction: float = 0.0, seed: int = 0) -> str:
    """Write the datalist of a folder of prepared subjects.

    Args:
        root: folder of prepared subjects; the list becomes datalist.json in it.
        validation: names of subjects that are kept out of training, separated by commas.
        validation_fraction: share of the other subjects that is drawn for validation.
        seed: seed of that draw.

    Returns:
        Path of the list.
    """
    from brainfm_monai.data.datalist import write_datalist

    return str(write_datalist(str(root), validation=validation, validation_fraction=validation_fraction, seed=seed))
