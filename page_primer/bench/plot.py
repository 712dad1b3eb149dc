"""A picture of the ratios and their intervals.

matplotlib (the extra `bench`) is imported where it is used: most runs have no picture, and an
installation need not have it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from page_primer.bench.failures import Failure

if TYPE_CHECKING:
    from page_primer.bench.report import Report

_SHOWN = (
    ("cpu_ms", "processor time"),
    ("rate", "throughput"),
    ("p99_ms", "p99 latency"),
    ("pss_mib", "PSS a worker"),
    ("wall_ms", "wall time"),
)


def check() -> None:
    """
    Raises:
        Failure: matplotlib is not installed.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise Failure(
            '--plot: matplotlib is not installed: pip install "page-primer[bench]"'
        ) from None


def write(report: Report, path: str) -> None:
    """Write the picture, in the format that the name's extension says.

    Raises:
        Failure: it cannot be written.
    """
    import matplotlib  # an extra, of this picture alone

    matplotlib.use("Agg")
    from matplotlib import pyplot  # after use()

    variants = report.variants[1:]
    shown = [(name, title) for name, title in _SHOWN if report.ratio(variants[0], name)]
    figure, panes = pyplot.subplots(
        1, len(shown), figsize=(3.2 * len(shown), 0.8 + 0.45 * len(variants)), sharey=True,
        squeeze=False,
    )  # fmt: skip
    for pane, (name, title) in zip(panes[0], shown, strict=True):
        for row, variant in enumerate(variants):
            found = report.ratio(variant, name)
            if found is None:
                continue
            low, high = found.low or found.middle, found.high or found.middle
            pane.plot([low, high], [row, row], color="tab:blue", linewidth=2)
            pane.plot([found.middle], [row], "o", color="tab:blue")
        pane.axvline(1, color="0.5", linewidth=1)
        pane.set_title(f"{title}, ratio to off", fontsize=9)
        pane.set_yticks(range(len(variants)), variants)
        pane.invert_yaxis()
        pane.tick_params(labelsize=8)
    figure.suptitle(f"{len(report.course.rounds)} paired rounds, 95 % intervals", fontsize=9)
    figure.tight_layout()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:
        raise Failure(f"--plot: {error}") from None
    finally:
        pyplot.close(figure)
