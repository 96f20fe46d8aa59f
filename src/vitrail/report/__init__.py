"""A study as one HTML file that needs nothing else: no network, no script, no torch to make it.

parts       what a section is made of: sentences, tables, drawings, photographs
page        the parts as HTML, and everything around them
sections    the sections in their order; a new one is one function more in its list
opening     what was studied, what was left out, how to cite the methods
heads, why, patterns, patches, windows, neurons   a section each
"""

from vitrail.report.sections import write_report

__all__ = ["write_report"]
