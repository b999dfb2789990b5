"""gRPC channel and server options: message limits, metadata limits, keepalive.

Knows numbers and their reasons; both sides must agree on the first two.
"""

CHUNK_BYTES = 1 << 20
"""Of a tensor, at most, in one message."""

MESSAGE_BYTES = 4 * CHUNK_BYTES
"""No message is larger: tensors travel in chunks, so this only bounds headers and what a stranger may send."""

METADATA_BYTES = 8 << 10
PING_MS = 20_000

CLIENT = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_metadata_size", METADATA_BYTES),
    ("grpc.keepalive_time_ms", PING_MS),
    ("grpc.keepalive_timeout_ms", PING_MS // 2),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.use_local_subchannel_pool", 1),  # a new channel tries at once, without another's back-off
    ("grpc.enable_retries", 0),  # requests are repeated by the link, which knows which ones are pending
)

SERVER = (
    ("grpc.max_receive_message_length", MESSAGE_BYTES),
    ("grpc.max_send_message_length", MESSAGE_BYTES),
    ("grpc.max_metadata_size", METADATA_BYTES),
    ("grpc.http2.min_ping_interval_without_data_ms", PING_MS // 2),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", PING_MS // 2),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.keepalive_time_ms", 2 * PING_MS),
    ("grpc.keepalive_timeout_ms", PING_MS),
    ("grpc.max_concurrent_streams", 256),
    ("grpc.so_reuseport", 0),  # a second server on the same port is a mistake, not a replica
)
