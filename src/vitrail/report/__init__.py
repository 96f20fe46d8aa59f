"""A study as one HTML file that needs nothing else: no network, no script, no torch to make it.

parts       what a section is made of: sentences, tables, drawings, photographs
page        the parts as HTML, and everything around them
sections    the sections in their order; a new one is one function more in its list
one_image   one image as a file of its own
opening     what was studied, what was left out, how to cite the methods
heads, why, patterns, patches, windows, neurons   a section each
"""

from vitrail.report.one_image import look_page, write_look
from vitrail.report.sections import findings_of, study_findings, write_report

__all__ = ["findings_of", "look_page", "study_findings", "write_look", "write_report"]
