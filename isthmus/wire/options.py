"""gRPC channel and server options: message limits, metadata limits, keepalive, and how long a connection may be.

Knows numbers and their reasons; both sides must agree on the first two and on pings.
"""

from typing import Final

CHUNK_BYTES = 1 << 20
"""Of a tensor, at most, in one message."""

MESSAGE_BYTES = 4 * CHUNK_BYTES
"""No message is larger: tensors travel in chunks, so this only bounds headers and what a stranger may send."""

METADATA_BYTES = 8 << 10
PING_MS = 20_000

PONG_MS = 20_000
"""A ping that is not answered for so long ends the connection: 2.5 MB may be in front of it on a line of 1 Mbit/s."""

CALLS: Final = 4096
"""Calls that a node has under way at most, sessions included; beyond, RESOURCE_EXHAUSTED."""

TIME: Final = "isthmus-time"
"""Header of the answer to `Describe`: the server's clock, in seconds since 1970."""

_BOTH: Final = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_metadata_size", METADATA_BYTES),
    ("grpc.absolute_max_metadata_size", METADATA_BYTES),  # else 16 KiB pass, and in between by chance
    ("grpc.keepalive_timeout_ms", PONG_MS),
    ("grpc.http2.ping_timeout_ms", PONG_MS),  # the one that counts; without it a minute
    ("grpc.keepalive_permit_without_calls", 1),
)

CLIENT = (
    *_BOTH,
    ("grpc.keepalive_time_ms", PING_MS),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a new channel tries at once, without another's back-off
    ("grpc.enable_retries", 0),  # requests are repeated by the link, which knows which ones are pending
)

SERVER = (
    *_BOTH,
    ("grpc.keepalive_time_ms", 2 * PING_MS),
    ("grpc.http2.min_ping_interval_without_data_ms", PING_MS // 2),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", PING_MS // 2),
    ("grpc.http2.max_ping_strikes", 2),  # then GOAWAY, too_many_pings
    ("grpc.max_concurrent_streams", 256),
    ("grpc.server_handshake_timeout_ms", 20_000),  # TLS, and the client's first HTTP/2 settings
    ("grpc.max_connection_idle_ms", 300_000),  # without a stream
    ("grpc.max_connection_age_ms", 3_600_000),  # new calls then take a new connection; those under way go on
    ("grpc.so_reuseport", 0),  # a second server on the same port is a mistake, not a replica
)
