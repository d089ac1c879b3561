"""Findings as one HTML page that needs nothing else. Knows the findings, not how they are made."""

from edge_memllm.interpretation.report.page import html_page

__all__ = ["html_page"]
