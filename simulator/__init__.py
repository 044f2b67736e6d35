"""The test feed: a server that speaks Polygon's crypto WebSocket and plays a file or a synthetic market.

`protocol`, `frame`, `market` (with `pair`, `minute`), `playback` and `tape` are pure: no socket, no clock.
`feed` and `server` are the I/O around them; `simulator.server.serve` is the way in.
"""
