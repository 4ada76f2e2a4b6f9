"""HTTP: one GET and its answer over one connection; knows nothing of stores, ranges of several objects or retries.

`exchange.exchange` does it, in this order:

1. `addresses` decides which headers and credentials the server gets, and through which proxy it is reached.
2. `connections.Connections` hands out an idle connection to that server, or makes one (TLS as `trusted` says).
3. The head of the answer comes back as an `exchange.Answer`. `answers` checks it: `check_partial_answer` and
   `check_whole_answer` for the range, size and version that were expected, `status_error` for any other status.
4. `Answer.receive` puts the body into memory of the caller.

Not promised: redirects are reported, not followed (`ranges.http` follows them). Nothing is sent again, except once on
a new connection where a kept one had been closed: what another attempt may fix is raised as `TryAgainError`, and
`ranges.retries` decides. The bytes of a body are counted, and compared with no checksum.

May import `errors` and `store_errors`.
"""
