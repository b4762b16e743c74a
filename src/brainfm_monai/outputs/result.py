"""Everything that is known about one scan after the network, and how its files are named, coded and described."""

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, wraps
from pathlib import Path
from threading import RLock
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import nibabel as nib
import numpy as np
import torch
from isal import igzip
from monai.data import MetaTensor
from monai.transforms.lazy.utils import resample as move
from monai.utils.enums import LazyAttr
from torch import Tensor

import brainfm_monai
from brainfm_monai.io import fingerprint, hash_file, refuse_if
from brainfm_monai.tasks import TaskLayout

P = ParamSpec("P")
T = TypeVar("T")
Writer = Callable[["ScanResult"], object]  # writes the files of an output
TEMPLATE_SPACE = "MNI152NLin2009aSym"  # the template that nilearn ships, by its BIDS name
SAME_VOXELS = 1e-3  # of a voxel: a distance below which two grids hold the same voxels
INT16_LEVELS = 60000  # grey values of an image that is stored in 16 bits
PACKING = 2  # level of igzip: as small as level 1 of zlib, in a tenth of its time


@dataclass(frozen=True)
class RunSettings:
    """What was used to compute the files of a run; every sidecar repeats it."""

    model: str = "brainfm-monai"  # whose networks and weights these are; BrainFM is another project
    version: str = ""  # version of the package
    weights: str = ""  # file of the weights
    weights_sha256: str = ""  # its hash; empty where there is no file
    protocol: str = ""  # label protocol
    mode: str = "whole_head"  # what of a head the scan shows
    grid: str = "scan"  # scan or 1mm
    # predicted distance at which the true white and pial boundary stand, measured for the weights
    surface_levels_mm: Sequence[float] = field(default_factory=lambda: [0.0, 0.0])
    configuration: str = ""  # hash of everything else in the config that results depend on, see :func:`describe_run`

    def __post_init__(self) -> None:
        refuse_if(self.grid not in ("scan", "1mm"), "grid: 'scan' or '1mm' is needed", f"'{self.grid}'")


def describe_run(weights: str | Path, layout: TaskLayout, depends: Sequence[Any] = (), **choices: Any) -> RunSettings:
    """Settings of a run, with the hash of its file of weights and of its configuration.

    ``depends`` are the objects of the config that results depend on (network, transforms, inferer, ...), as they were
    built from the resolved config, see :func:`~brainfm_monai.io.fingerprint`; ``choices`` are ``mode``, ``grid`` and
    ``surface_levels_mm`` of :class:`RunSettings`.
    """
    path = Path(weights)
    digest, protocol = hash_file(path) if path.is_file() else "", layout.protocol.name
    choices |= {"version": brainfm_monai.__version__, "configuration": fingerprint(layout, *depends)}
    return RunSettings(weights=path.name, weights_sha256=digest, protocol=protocol, **choices)


def once_per_scan(compute: Callable[Concatenate["ScanResult", P], T]) -> Callable[Concatenate["ScanResult", P], T]:
    """Decorator of a function that several outputs need: its result for a scan is computed once, in one thread."""

    @wraps(compute)
    def cached(scan: "ScanResult", *args: P.args, **kwargs: P.kwargs) -> T:
        lock, results = scan.computed.setdefault((compute, *args), (RLock(), []))
        with lock:
            if not results:
                results.append(compute(scan, *args, **kwargs))
        return cast(T, results[0])

    return cached


@dataclass(eq=False)
class ScanResult:
    """Everything that is known about one scan after the network."""

    name: str  # name of the scan, with which its files begin
    source: Path  # path of the scan
    folder: Path  # where to write
    layout: TaskLayout  # tasks and label protocol
    labels: np.ndarray  # label map in the grid of the files, shape (H, W, D), uint8
    affine: np.ndarray  # its voxel indices to RAS mm, shape (4, 4)
    # map of every task in the network's grid (1 mm, RAS), shape (C, h, w, d); segmentation is the label map there
    maps: Mapping[str, MetaTensor]
    # sum of each label's probability, shape (L,); None where it is not known
    soft_volumes_mm3: np.ndarray | None = None
    frame: int | str | None = None  # volume that was taken of a 4-D file
    window: str = ""  # intensities that a CT was clipped to; empty: none
    settings: RunSettings = field(default_factory=RunSettings)  # what was used
    # numbers of the scan for the table over all scans; the functions that write files add to it
    summary: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)  # what a user should look at
    # results of functions that are :func:`once_per_scan`, by function and arguments, each with its lock
    computed: dict[tuple[Any, ...], tuple[Any, list[Any]]] = field(default_factory=dict, repr=False)
    outputs: Collection[str] = ()  # names of all outputs that are written
    original: MetaTensor | None = None  # the scan as it was read, in its own intensities and grid, shape (1, h, w, d)
    normalised: MetaTensor | None = None  # the scan as the network saw it, in the grid of the maps, shape (1, h, w, d)
    modality: str = ""  # what the scan was taken for, with the reason: ct: ... or mr: ...; empty if that is not known

    def path(self, suffix: str) -> Path:
        """Path of the file that ends in ``suffix``."""
        return self.folder / f"{self.name}_{suffix}"

    @property
    @once_per_scan
    def image(self) -> MetaTensor:
        """The scan itself, shape (1, H, W, D), in its own intensities and in the grid of the files."""
        refuse_if(self.original is None, f"{self.source}: the scan itself is needed", "its maps alone")
        return resample(cast(MetaTensor, self.original), self.labels.shape, self.affine)

    @cached_property
    def network_affine(self) -> np.ndarray:
        """Voxel indices of :attr:`maps` to RAS mm, shape (4, 4)."""
        return np.asarray(next(iter(self.maps.values())).affine, dtype=np.float64)

    def in_network_grid(self, entry: str) -> np.ndarray:
        """A map as the network gives it, shape (C, h, w, d)."""
        return self.maps[entry].cpu().numpy()

    def in_grid(self, entry: str) -> np.ndarray:
        """A map in the grid of the files, linearly interpolated, shape (C, H, W, D), float32."""
        return resample(self.maps[entry], self.labels.shape, self.affine).cpu().numpy()

    def save_image(
        self, suffix: str, volume: np.ndarray, affine: np.ndarray | None = None, step: float | None = None, **more: Any
    ) -> None:
        """Write a volume, (H, W, D) or (H, W, D, C), as ``<suffix>.nii.gz``, and a sidecar with ``more``.

        The affine is that of the grid of the files if None. What is not integer is stored as 16-bit integers times the
        step; without one, as fine as 16 bits allow.
        """
        values, slope = volume, None
        if not np.issubdtype(volume.dtype, np.integer):
            smallest = float(np.finfo(np.float32).tiny)
            # a range of whole steps around 0, so that 0 stays 0
            slope = step or max(float(volume.max()), -float(volume.min()), smallest) * 2 / INT16_LEVELS
            values, limits = np.empty(volume.shape, np.int16, order="F"), np.iinfo(np.int16)
            axis = int(np.argmax(volume.strides[:3]))  # plane by plane, in the order of memory, they stay in the cache
            for plane, stored in zip(np.moveaxis(volume, axis, 0), np.moveaxis(values, axis, 0), strict=True):
                part = np.divide(plane, slope, dtype=np.float32)
                stored[...] = np.clip(np.rint(part, out=part), limits.min, limits.max, out=part)
        image = nib.Nifti1Image(values, self.affine if affine is None else affine)
        image.header.set_slope_inter(slope, None if slope is None else 0)
        self.save_nifti(suffix, image)
        self.write_sidecar(suffix, **more)

    def save_nifti(self, suffix: str, image: nib.Nifti1Image) -> None:
        """Write ``<suffix>.nii.gz``, whose unit is mm; the same image gives the same bytes."""
        image.header.set_xyzt_units("mm")
        with self.path(f"{suffix}.nii.gz").open("wb") as file:
            with igzip.IGzipFile("", "wb", PACKING, file, mtime=0) as packed:
                image.to_stream(packed)

    def save_map(
        self, entry: str, values: np.ndarray, text: str, affine: np.ndarray | None = None, **more: Any
    ) -> None:
        """Write a map, (C, H, W, D), under the name, in the unit and in the steps of its row in the table of tasks."""
        task, volume = self.layout.maps[entry], values[0]
        entries = {"Units": task.output_unit, "Description": text, **more}
        if task.channels > 1:
            entries["Channels"], volume = list(task.channel_names), np.moveaxis(values, 0, -1)
        self.save_image(task.stem, volume, affine, task.step, **entries)

    def write_sidecar(self, suffix: str, **entries: Any) -> None:
        """Write ``<suffix>.json``: the entries, the source and the settings."""
        content = {**entries, "Sources": [str(self.source)], "GeneratedBy": asdict(self.settings)}
        self.path(f"{suffix}.json").write_text(as_json(content), encoding="utf-8")


def as_json(content: Mapping[str, Any]) -> str:
    """The text of a JSON file."""
    return json.dumps(content, indent=2, default=str) + "\n"


# by output: what it needs of no other output, in parts that run side by side
AHEAD: dict[Writer, Sequence[Writer]] = {}
SHOWN: set[Writer] = set()  # outputs that show what the other outputs found: they are written last


def begun_ahead(*parts: Writer, shown: bool = False) -> Callable[[Writer], Writer]:
    """Decorator of an output whose parts, functions once per scan, run before other outputs; see :data:`SHOWN`."""

    def register(write: Writer) -> Writer:
        AHEAD[write] = parts
        SHOWN.update([write] if shown else [])
        return write

    return register


def resample(
    volume: Tensor, shape: Sequence[int], affine: np.ndarray, mode: str = "bilinear", padding_mode: str = "border"
) -> MetaTensor:
    """Bring a volume (C, h, w, d) to another grid: (C, *shape), float32; ``mode="nearest"`` keeps the dtype.

    The same voxels in another order are not interpolated.
    """
    source = volume if isinstance(volume, MetaTensor) else MetaTensor(volume)
    target = torch.from_numpy(np.array(affine))
    if tuple(source.shape[1:]) == tuple(shape) and torch.allclose(source.affine, target, rtol=1e-5, atol=1e-6):
        return source
    choices = {LazyAttr.SHAPE: shape, LazyAttr.INTERP_MODE: mode, LazyAttr.PADDING_MODE: padding_mode}
    to_source = torch.linalg.inv(source.affine) @ target
    moved = move(source, to_source, {**choices, LazyAttr.DTYPE: torch.float32, "atol": SAME_VOXELS})
    return MetaTensor(moved.as_tensor().to(source.dtype if mode == "nearest" else torch.float32), affine=target)
