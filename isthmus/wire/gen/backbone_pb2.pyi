from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Pass(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PASS_UNSPECIFIED: _ClassVar[Pass]
    PASS_FORWARD: _ClassVar[Pass]
    PASS_BACKWARD: _ClassVar[Pass]
    PASS_DECODE: _ClassVar[Pass]
    PASS_FORWARD_PORT: _ClassVar[Pass]
    PASS_BACKWARD_PORT: _ClassVar[Pass]
    PASS_DECODE_PORT: _ClassVar[Pass]
    PASS_PARK: _ClassVar[Pass]
    PASS_VALUES: _ClassVar[Pass]
    PASS_GRADIENTS: _ClassVar[Pass]
PASS_UNSPECIFIED: Pass
PASS_FORWARD: Pass
PASS_BACKWARD: Pass
PASS_DECODE: Pass
PASS_FORWARD_PORT: Pass
PASS_BACKWARD_PORT: Pass
PASS_DECODE_PORT: Pass
PASS_PARK: Pass
PASS_VALUES: Pass
PASS_GRADIENTS: Pass

class DescribeRequest(_message.Message):
    __slots__ = ("protocol", "client_version")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    CLIENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    client_version: str
    def __init__(self, protocol: _Optional[int] = ..., client_version: _Optional[str] = ...) -> None: ...

class ModelCard(_message.Message):
    __slots__ = ("protocol", "server_version", "model", "model_digest", "config_json", "blocks", "hidden_size", "dtype", "cuts", "codecs", "limits", "identity", "runtime")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    HIDDEN_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CUTS_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    IDENTITY_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    server_version: str
    model: str
    model_digest: str
    config_json: str
    blocks: int
    hidden_size: int
    dtype: str
    cuts: _containers.RepeatedCompositeFieldContainer[CutOffer]
    codecs: _containers.RepeatedScalarFieldContainer[str]
    limits: Limits
    identity: str
    runtime: str
    def __init__(self, protocol: _Optional[int] = ..., server_version: _Optional[str] = ..., model: _Optional[str] = ..., model_digest: _Optional[str] = ..., config_json: _Optional[str] = ..., blocks: _Optional[int] = ..., hidden_size: _Optional[int] = ..., dtype: _Optional[str] = ..., cuts: _Optional[_Iterable[_Union[CutOffer, _Mapping]]] = ..., codecs: _Optional[_Iterable[str]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ..., identity: _Optional[str] = ..., runtime: _Optional[str] = ...) -> None: ...

class CutOffer(_message.Message):
    __slots__ = ("bottom", "top", "ends_bundle", "ends_bytes")
    BOTTOM_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    ENDS_BUNDLE_FIELD_NUMBER: _ClassVar[int]
    ENDS_BYTES_FIELD_NUMBER: _ClassVar[int]
    bottom: int
    top: int
    ends_bundle: str
    ends_bytes: int
    def __init__(self, bottom: _Optional[int] = ..., top: _Optional[int] = ..., ends_bundle: _Optional[str] = ..., ends_bytes: _Optional[int] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("call_tokens", "row_tokens", "call_bytes", "calls_in_flight")
    CALL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROW_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CALL_BYTES_FIELD_NUMBER: _ClassVar[int]
    CALLS_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    call_tokens: int
    row_tokens: int
    call_bytes: int
    calls_in_flight: int
    def __init__(self, call_tokens: _Optional[int] = ..., row_tokens: _Optional[int] = ..., call_bytes: _Optional[int] = ..., calls_in_flight: _Optional[int] = ...) -> None: ...

class FetchRequest(_message.Message):
    __slots__ = ("bundle", "offset")
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    bundle: str
    offset: int
    def __init__(self, bundle: _Optional[str] = ..., offset: _Optional[int] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("protocol",)
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    def __init__(self, protocol: _Optional[int] = ...) -> None: ...

class EmulatorOffer(_message.Message):
    __slots__ = ("bundle", "bytes", "bottom", "top", "name", "description", "costs")
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    BOTTOM_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    DESCRIPTION_FIELD_NUMBER: _ClassVar[int]
    COSTS_FIELD_NUMBER: _ClassVar[int]
    bundle: str
    bytes: int
    bottom: int
    top: int
    name: str
    description: str
    costs: bytes
    def __init__(self, bundle: _Optional[str] = ..., bytes: _Optional[int] = ..., bottom: _Optional[int] = ..., top: _Optional[int] = ..., name: _Optional[str] = ..., description: _Optional[str] = ..., costs: _Optional[bytes] = ...) -> None: ...

class EmulatorList(_message.Message):
    __slots__ = ("emulators",)
    EMULATORS_FIELD_NUMBER: _ClassVar[int]
    emulators: _containers.RepeatedCompositeFieldContainer[EmulatorOffer]
    def __init__(self, emulators: _Optional[_Iterable[_Union[EmulatorOffer, _Mapping]]] = ...) -> None: ...

class SubmitReceipt(_message.Message):
    __slots__ = ("bundle", "already")
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    ALREADY_FIELD_NUMBER: _ClassVar[int]
    bundle: str
    already: bool
    def __init__(self, bundle: _Optional[str] = ..., already: _Optional[bool] = ...) -> None: ...

class BundleFrame(_message.Message):
    __slots__ = ("manifest", "signature", "offset", "data")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    manifest: bytes
    signature: bytes
    offset: int
    data: bytes
    def __init__(self, manifest: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "codec", "size", "checksum")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    codec: str
    size: int
    checksum: int
    def __init__(self, dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., codec: _Optional[str] = ..., size: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...

class Key(_message.Message):
    __slots__ = ("microbatch", "pass_kind")
    MICROBATCH_FIELD_NUMBER: _ClassVar[int]
    PASS_KIND_FIELD_NUMBER: _ClassVar[int]
    microbatch: int
    pass_kind: Pass
    def __init__(self, microbatch: _Optional[int] = ..., pass_kind: _Optional[_Union[Pass, str]] = ...) -> None: ...

class Rows(_message.Message):
    __slots__ = ("row_lengths", "starts", "wanted")
    ROW_LENGTHS_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    row_lengths: _containers.RepeatedScalarFieldContainer[int]
    starts: _containers.RepeatedScalarFieldContainer[int]
    wanted: bytes
    def __init__(self, row_lengths: _Optional[_Iterable[int]] = ..., starts: _Optional[_Iterable[int]] = ..., wanted: _Optional[bytes] = ...) -> None: ...

class Call(_message.Message):
    __slots__ = ("key", "tensors", "rows", "keep", "sequence", "apart", "input_gradient", "ports", "parked", "step", "parts")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    APART_FIELD_NUMBER: _ClassVar[int]
    INPUT_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    PORTS_FIELD_NUMBER: _ClassVar[int]
    PARKED_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    key: Key
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    rows: Rows
    keep: bool
    sequence: Sequence
    apart: bool
    input_gradient: bool
    ports: bytes
    parked: int
    step: int
    parts: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, key: _Optional[_Union[Key, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., rows: _Optional[_Union[Rows, _Mapping]] = ..., keep: _Optional[bool] = ..., sequence: _Optional[_Union[Sequence, _Mapping]] = ..., apart: _Optional[bool] = ..., input_gradient: _Optional[bool] = ..., ports: _Optional[bytes] = ..., parked: _Optional[int] = ..., step: _Optional[int] = ..., parts: _Optional[_Iterable[int]] = ...) -> None: ...

class Sequence(_message.Message):
    __slots__ = ("id", "start", "after")
    ID_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    id: str
    start: int
    after: int
    def __init__(self, id: _Optional[str] = ..., start: _Optional[int] = ..., after: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("key", "offset", "data")
    KEY_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    key: Key
    offset: int
    data: bytes
    def __init__(self, key: _Optional[_Union[Key, _Mapping]] = ..., offset: _Optional[int] = ..., data: _Optional[bytes] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("protocol", "session", "bottom", "top", "model_digest", "codec_activation", "codec_gradient", "deterministic", "forward_only", "ports", "codec_port")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    BOTTOM_FIELD_NUMBER: _ClassVar[int]
    TOP_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CODEC_ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    CODEC_GRADIENT_FIELD_NUMBER: _ClassVar[int]
    DETERMINISTIC_FIELD_NUMBER: _ClassVar[int]
    FORWARD_ONLY_FIELD_NUMBER: _ClassVar[int]
    PORTS_FIELD_NUMBER: _ClassVar[int]
    CODEC_PORT_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    session: str
    bottom: int
    top: int
    model_digest: str
    codec_activation: str
    codec_gradient: str
    deterministic: bool
    forward_only: bool
    ports: _containers.RepeatedCompositeFieldContainer[Port]
    codec_port: str
    def __init__(self, protocol: _Optional[int] = ..., session: _Optional[str] = ..., bottom: _Optional[int] = ..., top: _Optional[int] = ..., model_digest: _Optional[str] = ..., codec_activation: _Optional[str] = ..., codec_gradient: _Optional[str] = ..., deterministic: _Optional[bool] = ..., forward_only: _Optional[bool] = ..., ports: _Optional[_Iterable[_Union[Port, _Mapping]]] = ..., codec_port: _Optional[str] = ...) -> None: ...

class Port(_message.Message):
    __slots__ = ("kind", "block", "width", "module", "rank", "init", "seed")
    KIND_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    MODULE_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    INIT_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    kind: str
    block: int
    width: int
    module: str
    rank: int
    init: str
    seed: int
    def __init__(self, kind: _Optional[str] = ..., block: _Optional[int] = ..., width: _Optional[int] = ..., module: _Optional[str] = ..., rank: _Optional[int] = ..., init: _Optional[str] = ..., seed: _Optional[int] = ...) -> None: ...

class PortCall(_message.Message):
    __slots__ = ("key", "turn", "block", "modules", "backward", "wanted", "tensors")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TURN_FIELD_NUMBER: _ClassVar[int]
    BLOCK_FIELD_NUMBER: _ClassVar[int]
    MODULES_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    key: Key
    turn: int
    block: int
    modules: _containers.RepeatedScalarFieldContainer[str]
    backward: bool
    wanted: bool
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, key: _Optional[_Union[Key, _Mapping]] = ..., turn: _Optional[int] = ..., block: _Optional[int] = ..., modules: _Optional[_Iterable[str]] = ..., backward: _Optional[bool] = ..., wanted: _Optional[bool] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class PortAnswer(_message.Message):
    __slots__ = ("key", "turn", "tensors")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TURN_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    key: Key
    turn: int
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    def __init__(self, key: _Optional[_Union[Key, _Mapping]] = ..., turn: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("server_version",)
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    server_version: str
    def __init__(self, server_version: _Optional[str] = ...) -> None: ...

class Release(_message.Message):
    __slots__ = ("keys", "sequences")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedCompositeFieldContainer[Key]
    sequences: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, keys: _Optional[_Iterable[_Union[Key, _Mapping]]] = ..., sequences: _Optional[_Iterable[str]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: int
    def __init__(self, nonce: _Optional[int] = ...) -> None: ...

class Tally(_message.Message):
    __slots__ = ("received_bytes", "sent_bytes", "peak_tensor_bytes", "peak_memory_bytes")
    RECEIVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SENT_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEAK_TENSOR_BYTES_FIELD_NUMBER: _ClassVar[int]
    PEAK_MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    received_bytes: int
    sent_bytes: int
    peak_tensor_bytes: int
    peak_memory_bytes: int
    def __init__(self, received_bytes: _Optional[int] = ..., sent_bytes: _Optional[int] = ..., peak_tensor_bytes: _Optional[int] = ..., peak_memory_bytes: _Optional[int] = ...) -> None: ...

class Drain(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "message", "retry_after_s")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    retry_after_s: float
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., retry_after_s: _Optional[float] = ...) -> None: ...

class Cost(_message.Message):
    __slots__ = ("forward_flops", "backward_flops", "recompute_flops", "forward_s", "backward_s", "queue_s", "port_s")
    FORWARD_FLOPS_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_FLOPS_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTE_FLOPS_FIELD_NUMBER: _ClassVar[int]
    FORWARD_S_FIELD_NUMBER: _ClassVar[int]
    BACKWARD_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PORT_S_FIELD_NUMBER: _ClassVar[int]
    forward_flops: int
    backward_flops: int
    recompute_flops: int
    forward_s: float
    backward_s: float
    queue_s: float
    port_s: float
    def __init__(self, forward_flops: _Optional[int] = ..., backward_flops: _Optional[int] = ..., recompute_flops: _Optional[int] = ..., forward_s: _Optional[float] = ..., backward_s: _Optional[float] = ..., queue_s: _Optional[float] = ..., port_s: _Optional[float] = ...) -> None: ...

class Reply(_message.Message):
    __slots__ = ("key", "tensors", "kept", "cost", "failure")
    KEY_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    KEPT_FIELD_NUMBER: _ClassVar[int]
    COST_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    key: Key
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    kept: bool
    cost: Cost
    failure: Failure
    def __init__(self, key: _Optional[_Union[Key, _Mapping]] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., kept: _Optional[bool] = ..., cost: _Optional[_Union[Cost, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class ClientFrame(_message.Message):
    __slots__ = ("open", "call", "chunk", "release", "heartbeat", "tally", "port")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    CALL_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    TALLY_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    open: Open
    call: Call
    chunk: Chunk
    release: Release
    heartbeat: Heartbeat
    tally: Tally
    port: PortAnswer
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., call: _Optional[_Union[Call, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., tally: _Optional[_Union[Tally, _Mapping]] = ..., port: _Optional[_Union[PortAnswer, _Mapping]] = ...) -> None: ...

class ServerFrame(_message.Message):
    __slots__ = ("opened", "reply", "chunk", "heartbeat", "tally", "drain", "failure", "port")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    REPLY_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    TALLY_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    PORT_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    reply: Reply
    chunk: Chunk
    heartbeat: Heartbeat
    tally: Tally
    drain: Drain
    failure: Failure
    port: PortCall
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., reply: _Optional[_Union[Reply, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., tally: _Optional[_Union[Tally, _Mapping]] = ..., drain: _Optional[_Union[Drain, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., port: _Optional[_Union[PortCall, _Mapping]] = ...) -> None: ...

class RoundTerms(_message.Message):
    __slots__ = ("protocol", "name", "model_digest", "layout", "values", "clip", "every")
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    MODEL_DIGEST_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    CLIP_FIELD_NUMBER: _ClassVar[int]
    EVERY_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    name: str
    model_digest: str
    layout: bytes
    values: int
    clip: float
    every: int
    def __init__(self, protocol: _Optional[int] = ..., name: _Optional[str] = ..., model_digest: _Optional[str] = ..., layout: _Optional[bytes] = ..., values: _Optional[int] = ..., clip: _Optional[float] = ..., every: _Optional[int] = ...) -> None: ...

class RoundJoin(_message.Message):
    __slots__ = ("terms", "round", "cohort", "start", "commitment", "process")
    TERMS_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    COHORT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    COMMITMENT_FIELD_NUMBER: _ClassVar[int]
    PROCESS_FIELD_NUMBER: _ClassVar[int]
    terms: RoundTerms
    round: int
    cohort: int
    start: bytes
    commitment: bytes
    process: str
    def __init__(self, terms: _Optional[_Union[RoundTerms, _Mapping]] = ..., round: _Optional[int] = ..., cohort: _Optional[int] = ..., start: _Optional[bytes] = ..., commitment: _Optional[bytes] = ..., process: _Optional[str] = ...) -> None: ...

class RoundKey(_message.Message):
    __slots__ = ("name", "run", "round", "attempt", "public_key", "certificate", "signature")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    name: str
    run: str
    round: int
    attempt: int
    public_key: bytes
    certificate: bytes
    signature: bytes
    def __init__(self, name: _Optional[str] = ..., run: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., public_key: _Optional[bytes] = ..., certificate: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class RoundSubmit(_message.Message):
    __slots__ = ("name", "run", "round", "attempt", "masked")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    MASKED_FIELD_NUMBER: _ClassVar[int]
    name: str
    run: str
    round: int
    attempt: int
    masked: bytes
    def __init__(self, name: _Optional[str] = ..., run: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., masked: _Optional[bytes] = ...) -> None: ...

class RoundAsk(_message.Message):
    __slots__ = ("name", "run", "round")
    NAME_FIELD_NUMBER: _ClassVar[int]
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    name: str
    run: str
    round: int
    def __init__(self, name: _Optional[str] = ..., run: _Optional[str] = ..., round: _Optional[int] = ...) -> None: ...

class RoundState(_message.Message):
    __slots__ = ("run", "round", "attempt", "stage", "keys", "mine", "edges")
    class Stage(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        STAGE_UNSPECIFIED: _ClassVar[RoundState.Stage]
        STAGE_GATHERING: _ClassVar[RoundState.Stage]
        STAGE_KEYS: _ClassVar[RoundState.Stage]
        STAGE_SUMS: _ClassVar[RoundState.Stage]
        STAGE_DONE: _ClassVar[RoundState.Stage]
        STAGE_LEFT_OUT: _ClassVar[RoundState.Stage]
    STAGE_UNSPECIFIED: RoundState.Stage
    STAGE_GATHERING: RoundState.Stage
    STAGE_KEYS: RoundState.Stage
    STAGE_SUMS: RoundState.Stage
    STAGE_DONE: RoundState.Stage
    STAGE_LEFT_OUT: RoundState.Stage
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    STAGE_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    MINE_FIELD_NUMBER: _ClassVar[int]
    EDGES_FIELD_NUMBER: _ClassVar[int]
    run: str
    round: int
    attempt: int
    stage: RoundState.Stage
    keys: _containers.RepeatedCompositeFieldContainer[RoundKey]
    mine: bool
    edges: int
    def __init__(self, run: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ..., stage: _Optional[_Union[RoundState.Stage, str]] = ..., keys: _Optional[_Iterable[_Union[RoundKey, _Mapping]]] = ..., mine: _Optional[bool] = ..., edges: _Optional[int] = ...) -> None: ...

class RoundSum(_message.Message):
    __slots__ = ("sum", "edges", "mine")
    SUM_FIELD_NUMBER: _ClassVar[int]
    EDGES_FIELD_NUMBER: _ClassVar[int]
    MINE_FIELD_NUMBER: _ClassVar[int]
    sum: bytes
    edges: int
    mine: bool
    def __init__(self, sum: _Optional[bytes] = ..., edges: _Optional[int] = ..., mine: _Optional[bool] = ...) -> None: ...
