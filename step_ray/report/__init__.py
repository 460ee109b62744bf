"""The report of a run: one self-contained HTML file, a terminal table, results.json and .csv.

`results` compares the arms, `collection` counts its episodes, `charts` turns losses into
coordinates, `page` renders the HTML, `episodes` a second file with every episode, or one with both.
All take plain data, read no run folder and never invent a number: what was not measured is shown as
"not run".
"""

from step_ray.report.collection import CollectionCounts
from step_ray.report.page import report_body, write_report
from step_ray.report.results import (
    ReportInputs,
    results_rows,
    results_table,
    splits_table,
    write_results,
)

__all__ = [
    "CollectionCounts",
    "ReportInputs",
    "report_body",
    "results_rows",
    "results_table",
    "splits_table",
    "write_report",
    "write_results",
]
