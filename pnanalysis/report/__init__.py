"""The report: one self-contained HTML page about one or more runs."""

from pnanalysis.report.page import write_report
from pnanalysis.report.tables import summary_sentences, summary_table

__all__ = ["summary_sentences", "summary_table", "write_report"]
