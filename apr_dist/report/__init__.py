"""Pictures and tables of a run, made from what it left behind."""

from apr_dist.report.verdict_table import verdict_lines

__all__ = ["verdict_lines"]
