from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class HealthRequest(_message.Message):
    __slots__ = ("service",)
    SERVICE_FIELD_NUMBER: _ClassVar[int]
    service: str
    def __init__(self, service: _Optional[str] = ...) -> None: ...

class HealthAnswer(_message.Message):
    __slots__ = ("status",)
    class Status(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        UNKNOWN: _ClassVar[HealthAnswer.Status]
        SERVING: _ClassVar[HealthAnswer.Status]
        NOT_SERVING: _ClassVar[HealthAnswer.Status]
        SERVICE_UNKNOWN: _ClassVar[HealthAnswer.Status]
    UNKNOWN: HealthAnswer.Status
    SERVING: HealthAnswer.Status
    NOT_SERVING: HealthAnswer.Status
    SERVICE_UNKNOWN: HealthAnswer.Status
    STATUS_FIELD_NUMBER: _ClassVar[int]
    status: HealthAnswer.Status
    def __init__(self, status: _Optional[_Union[HealthAnswer.Status, str]] = ...) -> None: ...
