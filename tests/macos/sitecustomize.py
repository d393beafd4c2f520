"""Makes Linux as much like macOS as it can be: for each Python that starts with this directory in its path."""

import contextlib
import fcntl
import select
import selectors

select.PIPE_BUF = 512
selectors.DefaultSelector = selectors.SelectSelector
with contextlib.suppress(AttributeError):
    del fcntl.F_SETPIPE_SZ
