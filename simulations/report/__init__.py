"""What runs found, for a reader: one page that needs no network, and the same plots as files for a paper."""

from corolla.simulations.report.figures import FORMATS, write_figures
from corolla.simulations.report.gather import gather, gather_noise
from corolla.simulations.report.page import render, render_noise, write_report

__all__ = ["FORMATS", "gather", "gather_noise", "render", "render_noise", "write_figures", "write_report"]
