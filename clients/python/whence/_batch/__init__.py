"""Explaining a whole bucket: every object ends exactly once among results or failures, whatever is killed.

::

    run ──> planning ──> sources, listing, plan       what there is to do, written down once
     │
     └────> pipeline ──> limiter, verdicts, chunk     doing it, chunk by chunk
                            │
    reader ─────────────> commits ──> output          what is done; the one place that decides it

A chunk of keys is done when its commit exists. Commits are created, never overwritten, by a store that lets one writer
win; readers follow commits alone. All else follows from that.
"""
