"""Files: what is read and written, whole or not at all, and errors in one line."""

from brainfm_monai.io.configs import fingerprint, literal
from brainfm_monai.io.errors import ScanError, exit_on_error, first_line, one_line
from brainfm_monai.io.files import write_folder, write_text, write_whole
from brainfm_monai.io.tables import ABSENT, read_table, write_table

__all__ = [
    "ABSENT",
    "ScanError",
    "exit_on_error",
    "fingerprint",
    "first_line",
    "literal",
    "one_line",
    "read_table",
    "write_folder",
    "write_table",
    "write_text",
    "write_whole",
]
