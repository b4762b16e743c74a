"""Files: what is read and written, whole or not at all, and errors in one line."""

from brainfm_monai.io.configs import bundle_arguments, find_bundle, find_config, fingerprint, literal
from brainfm_monai.io.dicom import is_dicom, list_series
from brainfm_monai.io.find import find_contradiction, find_scans
from brainfm_monai.io.scans import Scan, make_scans, printable, unique_names
from brainfm_monai.io.volumes import SCAN_SUFFIXES, Volume, read_labels, read_maps, read_scan, read_volume, scan_stem

from brainfm_monai.io.files import (  # isort: skip
    ABSENT, ScanError, exit_on_error, find_repeated, first_line, hash_file, hold_beside, locked, one_line, read_table,
    refuse_if, write_table, write_text, write_whole,
)  # fmt: skip
