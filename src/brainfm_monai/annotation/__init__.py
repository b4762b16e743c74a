"""Annotation of scans with a MONAI Label server: settings of a click, labels by name, training on corrected scans."""
