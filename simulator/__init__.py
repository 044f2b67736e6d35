"""The test feed: a server that speaks Polygon's crypto WebSocket and REST, and can do its worst.

The market: `market` (with `pair`, `minute`, `symbols`) or `playback` yields frames, `tape` says when each is due.
The socket: `protocol` is the conversation, `deal` who gets what, `mischief` what faults do to frames, `record`
what is written of it. REST: `history`, `rest`. `faults` is what can go wrong. These are pure, except for `rest`;
`feed`, `connections`, `listener`, `injector` and `control` are the I/O; `simulator.server.serve` is the way in.
"""
