"""HTTP: requests (HEAD, whole GETs, ranged GETs) and their answers; knows nothing of stores, and tries nothing again.

`redirects.follow` does it, in this order:

1. `settings.settings_of` has read what ``storage_options`` say, once for all requests of a store. `addresses` decides
   which headers and credentials a server gets, and through which proxy it is reached.
2. `connections.Connections` hands out an idle connection to that server, or makes one (TLS as `trusted` says).
3. `exchange.exchange` sends the request, and the head of the answer comes back as an `exchange.Answer`. Where that is a
   redirect, the next server is asked, without the headers that are the user's.
4. `answers` checks it: `check_partial_answer`, `check_whole_answer` and `check_expected` for the range, size and
   version that were expected; `status_error` makes an error of any other status.
5. `Answer.receive` puts a body of known length into memory of the caller; `Answer.pieces` hands out any body to its
   end.

A request that was sent over a kept connection, which the server had closed, is sent once more over a new one. What else
another attempt may fix is raised as `TryAgainError`, with the server whose failure it is, and ``loader.retries``
decides.

Not promised: the bytes of a body are counted, and compared with no checksum.

May import `retries`, `redaction`, `store_errors` and `errors`.
"""
