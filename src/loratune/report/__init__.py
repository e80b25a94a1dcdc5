"""What people look at: a run folder as one offline HTML file. No torch."""

from loratune.report.comparison import write_comparison
from loratune.report.page import REPORT, write_report

__all__ = ["REPORT", "write_comparison", "write_report"]
