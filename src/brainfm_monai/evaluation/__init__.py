"""Scans under conditions, measures of every task, tables and a page; two evaluations compared. Import the modules."""
