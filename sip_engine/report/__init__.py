"""The HTML report of one or more runs."""

from sip_engine.report.html import write_report

__all__ = ["write_report"]
