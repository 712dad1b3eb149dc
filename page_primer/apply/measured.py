"""What a report says of locks and options, whatever the objects are."""

from __future__ import annotations

import os

from page_primer import _core, survey
from page_primer.kernel import memlock
from page_primer.kernel.limits import soft_limit
from page_primer.options import unknown_variables
from page_primer.report import Report

TYPE_CHECKING = False
if TYPE_CHECKING:
    from page_primer.apply.mlocks import Mlocks
    from page_primer.options import Options


def measured(options: Options | None, mlocks: Mlocks) -> Report:
    """A report without objects.

    Args:
        options: those that are in force, if any.
        mlocks: what is locked, and what is not.
    """
    made, refused = mlocks.sizes
    return Report(
        pid=os.getpid(),
        reason=None,
        lock_wanted_bytes=refused + mlocks.withheld + made,
        lock_refused_bytes=refused,
        lock_withheld_bytes=mlocks.withheld,
        lock_refusal=mlocks.refusal,
        lock_limit=soft_limit(_core.RLIMIT_MEMLOCK) if mlocks.refusal == memlock.OVER else None,
        memory_share=options.memory_share if options else None,
        warn=options.named if options else (),
        backing=options.backing if options else "auto",
        image_dir=options.image_dir if options else None,
        threads=survey.threads(),
        unknown_variables=unknown_variables(),
    )
