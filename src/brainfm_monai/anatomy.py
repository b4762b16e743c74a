"""Label protocols: one table each, from which look-up tables, mirror rules and colours follow."""

import csv
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from pathlib import Path

import numpy as np

OPPOSITE = {"none": "none", "left": "right", "right": "left"}  # side of the partner in the mirror
MAXIMUM_LABELS = 256  # label maps have one byte for each voxel
HEAD_IDS = (*range(500, 600), *range(900, 1000))  # SynthSeg's and SuperSynth's ids of what is not brain
# FreeSurfer ids of ventricles, their choroid plexus and patches of them (SynthSeg), and the fluid around the brain
FLUID_IDS = (4, 5, 14, 15, 24, 31, 43, 44, 63, 72, 136, 137, 163, 164)
SHARE_TOLERANCE = 1e-6  # of the sum of a mixture's shares, which are written with two digits
SHIPPED = resources.files("brainfm_monai") / "protocols"
COLUMNS = ("label", "freesurfer_id", "name", "side", "mirror", "red", "green", "blue", "includes")


def is_head(freesurfer_ids: np.ndarray) -> np.ndarray:
    """Which FreeSurfer ids are tissues of the head outside the brain, any shape, bool."""
    return np.isin(freesurfer_ids, HEAD_IDS)


def is_brain(freesurfer_ids: np.ndarray) -> np.ndarray:
    """Which FreeSurfer ids are brain or fluid in and around the brain, any shape, bool: neither background nor head."""
    return ~is_head(freesurfer_ids) & (freesurfer_ids > 0)


def is_fluid(freesurfer_ids: np.ndarray) -> np.ndarray:
    """Which FreeSurfer ids are ventricles, choroid plexus or the fluid around the brain, any shape, bool."""
    return np.isin(freesurfer_ids, FLUID_IDS)


@dataclass(frozen=True)
class Structure:
    """One row of a protocol table."""

    label: int  # contiguous index, which is also the channel of the structure in the network's output
    freesurfer_id: int  # id of the structure in FreeSurfer's colour table (5xx: SynthSeg's head labels)
    name: str  # without blanks
    side: str  # "none", "left" or "right"
    mirror: int  # label of the structure on the other side; the own label where there is none
    colour: tuple[int, ...]  # red, green and blue in [0, 255]
    includes: tuple[int, ...] = ()  # further ids in the source maps that become this structure
    mixture: tuple[tuple[int, float], ...] = ()  # (FreeSurfer id, share) of the parts of a partial-volume code


@dataclass(frozen=True)
class Protocol:
    """A named set of structures, background first.

    A protocol is one tab-separated table with the columns :data:`COLUMNS`; ``includes`` lists, separated by blanks, ids
    of the source maps that are folded into the structure. A column ``mixture`` may follow: ``2:0.48 3:0.52`` makes a
    label a partial-volume code of the structures with ids 2 and 3. ValueError if labels are not 0, 1, 2, ... in order,
    or more than 256; if an id stands twice, the mirror rule is not its own inverse, or the shares of a mixture do not
    sum to 1 over pure structures of the table.
    """

    name: str
    structures: tuple[Structure, ...]

    def __post_init__(self) -> None:
        start, labels = f"protocol {self.name}:", [s.label for s in self.structures]
        if len(labels) > MAXIMUM_LABELS:
            raise ValueError(f"{start} at most {MAXIMUM_LABELS} labels are possible, found {len(labels)}")
        if labels != list(range(len(labels))):
            raise ValueError(f"{start} labels must be 0, 1, 2, ... in order, got {labels}")
        counts = Counter(i for s in self.structures for i in (s.freesurfer_id, *s.includes))
        if len(counts) < counts.total():
            twice = sorted(i for i, count in counts.items() if count > 1)
            raise ValueError(f"{start} an id may stand once, found more than once: {twice}")
        pure = {s.freesurfer_id for s in self.structures if not s.mixture}
        for s in self.structures:
            partner = self.structures[s.mirror] if 0 <= s.mirror < len(labels) else None
            if partner is None or (partner.mirror, partner.side) != (s.label, OPPOSITE[s.side]):
                raise ValueError(f"{start} {s.name} ({s.side}) names mirror {s.mirror}, which does not name it back")
            sources, total = {i for i, _ in s.mixture}, sum(share for _, share in s.mixture)
            if s.mixture and not (sources <= pure and abs(total - 1) <= SHARE_TOLERANCE):
                rule = "must mix pure structures with shares that sum to 1"
                raise ValueError(f"{start} {s.name} {rule}, got {s.mixture}")

    def __len__(self) -> int:
        return len(self.structures)

    @classmethod
    def load(cls, source: str | Path) -> "Protocol":
        """Read a shipped protocol by its name (``brainfm``) or a table file; FileNotFoundError if it is neither."""
        path, shipped = Path(source), SHIPPED / f"{source}.tsv"
        if not path.suffix and shipped.is_file():
            return cls(str(source), _parse(shipped.read_text(encoding="utf-8"), str(source)))
        if not path.is_file():
            known = ", ".join(cls.names())
            raise FileNotFoundError(f"{source}: not a protocol of this package ({known}) and not a file")
        return cls(path.stem, _parse(path.read_text(encoding="utf-8"), path.name))

    @staticmethod
    def names() -> list[str]:
        """Names of the protocols that the package ships."""
        return sorted(f.name.removesuffix(".tsv") for f in SHIPPED.iterdir() if f.name.endswith(".tsv"))

    # label of every known source id
    label_of_id = cached_property[dict[int, int]](
        lambda self: {i: s.label for s in self.structures for i in (s.freesurfer_id, *s.includes)}
    )
    # FreeSurfer id of every label, shape (L,): index it by a label map to get ids
    freesurfer_ids = cached_property[np.ndarray](
        lambda self: np.array([s.freesurfer_id for s in self.structures], dtype=np.int32)
    )
    # label on the other side for every label; applied twice it is the identity
    mirror_permutation = cached_property[list[int]](lambda self: [s.mirror for s in self.structures])
    # which labels are of these kinds, shape (L,), bool; a hemisphere is a part of the brain with a side
    is_head = cached_property[np.ndarray](lambda self: is_head(self.freesurfer_ids))
    is_brain = cached_property[np.ndarray](lambda self: is_brain(self.freesurfer_ids))
    is_fluid = cached_property[np.ndarray](lambda self: is_fluid(self.freesurfer_ids))
    is_hemisphere = cached_property[np.ndarray](
        lambda self: self.is_brain & np.array([s.side != "none" for s in self.structures])
    )

    @cached_property
    def mixture_weights(self) -> np.ndarray:
        """Share of every pure structure in every label, shape (L, L), float32: the identity where nothing is mixed."""
        weights = np.eye(len(self), dtype=np.float32)
        for s in self.structures:
            weights[s.label, s.label] = not s.mixture
            for source, share in s.mixture:
                weights[s.label, self.label_of_id[source]] += share
        return weights

    def encode(self, ids: np.ndarray, source: str = "label map") -> np.ndarray:
        """Labels, uint8, of a map of source ids, any shape; an unknown id is a ValueError that names ``source``."""
        whole = np.rint(ids).astype(np.int64)
        present = np.unique(whole)
        if unknown := [int(i) for i in present if int(i) not in self.label_of_id]:
            raise ValueError(f"{source}: every id must be in protocol '{self.name}', found unknown ids {unknown[:10]}")
        table = np.zeros(int(present.max()) + 1, dtype=np.uint8)
        table[present] = [self.label_of_id[int(i)] for i in present]
        return table[whole]


def _parse(text: str, source: str) -> tuple[Structure, ...]:
    rows = list(csv.DictReader(text.splitlines(), delimiter="\t"))
    if not rows or set(COLUMNS) - set(rows[0]):
        found = " ".join(rows[0]) if rows else "no rows"
        raise ValueError(f"{source}: a protocol table needs the columns {' '.join(COLUMNS)}, found {found}")
    structures = []
    for number, row in enumerate(rows, start=2):
        name, side = row["name"], row["side"]
        if side not in OPPOSITE:
            raise ValueError(f"{source}, line {number}: side must be one of {tuple(OPPOSITE)}, found '{side}'")
        try:
            columns = ("label", "freesurfer_id", "mirror", "red", "green", "blue")
            label, freesurfer_id, mirror, *colour = (int(row[column]) for column in columns)
            includes = tuple(int(i) for i in (row["includes"] or "").split())
            parts = [part.split(":") for part in (row.get("mixture") or "").split()]
            mixture = tuple((int(part), float(share)) for part, share in parts)
        except ValueError as error:
            raise ValueError(f"{source}, line {number}: numbers are needed, {error}") from error
        structures.append(Structure(label, freesurfer_id, name, side, mirror, tuple(colour), includes, mixture))
    return tuple(structures)
