import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from whence.v1 import bank_pb2 as _bank_pb2
from whence.v1 import explanation_pb2 as _explanation_pb2
from whence.v1 import image_pb2 as _image_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_INTERACTIVE: _ClassVar[Priority]
    PRIORITY_BACKGROUND: _ClassVar[Priority]

class SearchBy(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SEARCH_BY_UNSPECIFIED: _ClassVar[SearchBy]
    SEARCH_BY_MEANING: _ClassVar[SearchBy]
    SEARCH_BY_LABEL: _ClassVar[SearchBy]

class ContractRevision(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONTRACT_REVISION_UNSPECIFIED: _ClassVar[ContractRevision]
    CONTRACT_REVISION_1: _ClassVar[ContractRevision]
PRIORITY_UNSPECIFIED: Priority
PRIORITY_INTERACTIVE: Priority
PRIORITY_BACKGROUND: Priority
SEARCH_BY_UNSPECIFIED: SearchBy
SEARCH_BY_MEANING: SearchBy
SEARCH_BY_LABEL: SearchBy
CONTRACT_REVISION_UNSPECIFIED: ContractRevision
CONTRACT_REVISION_1: ContractRevision

class ExplainRequest(_message.Message):
    __slots__ = ("request_id", "image", "bank", "target", "options", "deadline", "priority")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    BANK_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    image: _image_pb2.Image
    bank: str
    target: _explanation_pb2.Target
    options: _explanation_pb2.ExplainOptions
    deadline: _duration_pb2.Duration
    priority: Priority
    def __init__(self, request_id: _Optional[str] = ..., image: _Optional[_Union[_image_pb2.Image, _Mapping]] = ..., bank: _Optional[str] = ..., target: _Optional[_Union[_explanation_pb2.Target, _Mapping]] = ..., options: _Optional[_Union[_explanation_pb2.ExplainOptions, _Mapping]] = ..., deadline: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., priority: _Optional[_Union[Priority, str]] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("request_id", "explanation")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    explanation: _explanation_pb2.Explanation
    def __init__(self, request_id: _Optional[str] = ..., explanation: _Optional[_Union[_explanation_pb2.Explanation, _Mapping]] = ...) -> None: ...

class ExplainStreamRequest(_message.Message):
    __slots__ = ("request",)
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    request: ExplainRequest
    def __init__(self, request: _Optional[_Union[ExplainRequest, _Mapping]] = ...) -> None: ...

class ExplainStreamResponse(_message.Message):
    __slots__ = ("request_id", "explanation", "error")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    EXPLANATION_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    explanation: _explanation_pb2.Explanation
    error: Failure
    def __init__(self, request_id: _Optional[str] = ..., explanation: _Optional[_Union[_explanation_pb2.Explanation, _Mapping]] = ..., error: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "message", "reason", "metadata", "retry_after")
    class MetadataEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    METADATA_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    reason: str
    metadata: _containers.ScalarMap[str, str]
    retry_after: _duration_pb2.Duration
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., reason: _Optional[str] = ..., metadata: _Optional[_Mapping[str, str]] = ..., retry_after: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class ContrastRequest(_message.Message):
    __slots__ = ("request_id", "image", "bank", "target", "other", "options", "deadline", "without_shift")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    BANK_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    OTHER_FIELD_NUMBER: _ClassVar[int]
    OPTIONS_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_FIELD_NUMBER: _ClassVar[int]
    WITHOUT_SHIFT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    image: _image_pb2.Image
    bank: str
    target: _explanation_pb2.Target
    other: _explanation_pb2.Target
    options: _explanation_pb2.ExplainOptions
    deadline: _duration_pb2.Duration
    without_shift: bool
    def __init__(self, request_id: _Optional[str] = ..., image: _Optional[_Union[_image_pb2.Image, _Mapping]] = ..., bank: _Optional[str] = ..., target: _Optional[_Union[_explanation_pb2.Target, _Mapping]] = ..., other: _Optional[_Union[_explanation_pb2.Target, _Mapping]] = ..., options: _Optional[_Union[_explanation_pb2.ExplainOptions, _Mapping]] = ..., deadline: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., without_shift: _Optional[bool] = ...) -> None: ...

class ContrastResponse(_message.Message):
    __slots__ = ("request_id", "model", "bank", "target", "other", "contribution", "maps", "concepts", "faithfulness", "flip_shift", "shift_curve", "timings", "view", "runtime", "contribution_for_target", "contribution_for_other", "plane")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BANK_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    OTHER_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    MAPS_FIELD_NUMBER: _ClassVar[int]
    CONCEPTS_FIELD_NUMBER: _ClassVar[int]
    FAITHFULNESS_FIELD_NUMBER: _ClassVar[int]
    FLIP_SHIFT_FIELD_NUMBER: _ClassVar[int]
    SHIFT_CURVE_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTION_FOR_TARGET_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTION_FOR_OTHER_FIELD_NUMBER: _ClassVar[int]
    PLANE_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: _explanation_pb2.ModelVersion
    bank: _explanation_pb2.BankVersion
    target: _explanation_pb2.ClassScore
    other: _explanation_pb2.ClassScore
    contribution: float
    maps: _containers.RepeatedCompositeFieldContainer[_explanation_pb2.Map]
    concepts: _containers.RepeatedCompositeFieldContainer[_explanation_pb2.ConceptScore]
    faithfulness: _explanation_pb2.FaithfulnessReport
    flip_shift: float
    shift_curve: _containers.RepeatedCompositeFieldContainer[ShiftPoint]
    timings: _explanation_pb2.Timings
    view: _image_pb2.Box
    runtime: str
    contribution_for_target: float
    contribution_for_other: float
    plane: PlaneReport
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[_Union[_explanation_pb2.ModelVersion, _Mapping]] = ..., bank: _Optional[_Union[_explanation_pb2.BankVersion, _Mapping]] = ..., target: _Optional[_Union[_explanation_pb2.ClassScore, _Mapping]] = ..., other: _Optional[_Union[_explanation_pb2.ClassScore, _Mapping]] = ..., contribution: _Optional[float] = ..., maps: _Optional[_Iterable[_Union[_explanation_pb2.Map, _Mapping]]] = ..., concepts: _Optional[_Iterable[_Union[_explanation_pb2.ConceptScore, _Mapping]]] = ..., faithfulness: _Optional[_Union[_explanation_pb2.FaithfulnessReport, _Mapping]] = ..., flip_shift: _Optional[float] = ..., shift_curve: _Optional[_Iterable[_Union[ShiftPoint, _Mapping]]] = ..., timings: _Optional[_Union[_explanation_pb2.Timings, _Mapping]] = ..., view: _Optional[_Union[_image_pb2.Box, _Mapping]] = ..., runtime: _Optional[str] = ..., contribution_for_target: _Optional[float] = ..., contribution_for_other: _Optional[float] = ..., plane: _Optional[_Union[PlaneReport, _Mapping]] = ...) -> None: ...

class PlaneReport(_message.Message):
    __slots__ = ("accuracy", "margin", "swap_rate", "swap_shift", "target_images", "other_images")
    ACCURACY_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    SWAP_RATE_FIELD_NUMBER: _ClassVar[int]
    SWAP_SHIFT_FIELD_NUMBER: _ClassVar[int]
    TARGET_IMAGES_FIELD_NUMBER: _ClassVar[int]
    OTHER_IMAGES_FIELD_NUMBER: _ClassVar[int]
    accuracy: float
    margin: float
    swap_rate: float
    swap_shift: float
    target_images: int
    other_images: int
    def __init__(self, accuracy: _Optional[float] = ..., margin: _Optional[float] = ..., swap_rate: _Optional[float] = ..., swap_shift: _Optional[float] = ..., target_images: _Optional[int] = ..., other_images: _Optional[int] = ...) -> None: ...

class ShiftPoint(_message.Message):
    __slots__ = ("shift", "target_probability", "other_probability")
    SHIFT_FIELD_NUMBER: _ClassVar[int]
    TARGET_PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    OTHER_PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    shift: float
    target_probability: float
    other_probability: float
    def __init__(self, shift: _Optional[float] = ..., target_probability: _Optional[float] = ..., other_probability: _Optional[float] = ...) -> None: ...

class InterveneRequest(_message.Message):
    __slots__ = ("request_id", "image", "bank", "scales", "deadline", "target", "concepts")
    class ScalesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FIELD_NUMBER: _ClassVar[int]
    BANK_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    CONCEPTS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    image: _image_pb2.Image
    bank: str
    scales: _containers.ScalarMap[int, float]
    deadline: _duration_pb2.Duration
    target: _explanation_pb2.Target
    concepts: _explanation_pb2.ConceptScope
    def __init__(self, request_id: _Optional[str] = ..., image: _Optional[_Union[_image_pb2.Image, _Mapping]] = ..., bank: _Optional[str] = ..., scales: _Optional[_Mapping[int, float]] = ..., deadline: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., target: _Optional[_Union[_explanation_pb2.Target, _Mapping]] = ..., concepts: _Optional[_Union[_explanation_pb2.ConceptScope, str]] = ...) -> None: ...

class InterveneResponse(_message.Message):
    __slots__ = ("request_id", "model", "bank", "before", "after", "timings", "runtime", "target")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BANK_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: _explanation_pb2.ModelVersion
    bank: _explanation_pb2.BankVersion
    before: _containers.RepeatedCompositeFieldContainer[_explanation_pb2.ClassScore]
    after: _containers.RepeatedCompositeFieldContainer[_explanation_pb2.ClassScore]
    timings: _explanation_pb2.Timings
    runtime: str
    target: _explanation_pb2.ClassScore
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[_Union[_explanation_pb2.ModelVersion, _Mapping]] = ..., bank: _Optional[_Union[_explanation_pb2.BankVersion, _Mapping]] = ..., before: _Optional[_Iterable[_Union[_explanation_pb2.ClassScore, _Mapping]]] = ..., after: _Optional[_Iterable[_Union[_explanation_pb2.ClassScore, _Mapping]]] = ..., timings: _Optional[_Union[_explanation_pb2.Timings, _Mapping]] = ..., runtime: _Optional[str] = ..., target: _Optional[_Union[_explanation_pb2.ClassScore, _Mapping]] = ...) -> None: ...

class ListModelsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListModelsResponse(_message.Message):
    __slots__ = ("models",)
    MODELS_FIELD_NUMBER: _ClassVar[int]
    models: _containers.RepeatedCompositeFieldContainer[_bank_pb2.Model]
    def __init__(self, models: _Optional[_Iterable[_Union[_bank_pb2.Model, _Mapping]]] = ...) -> None: ...

class ListBanksRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class ListBanksResponse(_message.Message):
    __slots__ = ("banks",)
    BANKS_FIELD_NUMBER: _ClassVar[int]
    banks: _containers.RepeatedCompositeFieldContainer[_bank_pb2.Bank]
    def __init__(self, banks: _Optional[_Iterable[_Union[_bank_pb2.Bank, _Mapping]]] = ...) -> None: ...

class GetBankRequest(_message.Message):
    __slots__ = ("bank",)
    BANK_FIELD_NUMBER: _ClassVar[int]
    bank: str
    def __init__(self, bank: _Optional[str] = ...) -> None: ...

class GetBankResponse(_message.Message):
    __slots__ = ("bank",)
    BANK_FIELD_NUMBER: _ClassVar[int]
    bank: _bank_pb2.Bank
    def __init__(self, bank: _Optional[_Union[_bank_pb2.Bank, _Mapping]] = ...) -> None: ...

class GetConceptRequest(_message.Message):
    __slots__ = ("bank", "concept_id", "max_exemplars")
    BANK_FIELD_NUMBER: _ClassVar[int]
    CONCEPT_ID_FIELD_NUMBER: _ClassVar[int]
    MAX_EXEMPLARS_FIELD_NUMBER: _ClassVar[int]
    bank: str
    concept_id: int
    max_exemplars: int
    def __init__(self, bank: _Optional[str] = ..., concept_id: _Optional[int] = ..., max_exemplars: _Optional[int] = ...) -> None: ...

class GetConceptResponse(_message.Message):
    __slots__ = ("concept", "bank")
    CONCEPT_FIELD_NUMBER: _ClassVar[int]
    BANK_FIELD_NUMBER: _ClassVar[int]
    concept: _bank_pb2.Concept
    bank: _explanation_pb2.BankVersion
    def __init__(self, concept: _Optional[_Union[_bank_pb2.Concept, _Mapping]] = ..., bank: _Optional[_Union[_explanation_pb2.BankVersion, _Mapping]] = ...) -> None: ...

class SearchConceptsRequest(_message.Message):
    __slots__ = ("text", "by", "model", "bank", "limit", "max_exemplars")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    BY_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BANK_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    MAX_EXEMPLARS_FIELD_NUMBER: _ClassVar[int]
    text: str
    by: SearchBy
    model: str
    bank: str
    limit: int
    max_exemplars: int
    def __init__(self, text: _Optional[str] = ..., by: _Optional[_Union[SearchBy, str]] = ..., model: _Optional[str] = ..., bank: _Optional[str] = ..., limit: _Optional[int] = ..., max_exemplars: _Optional[int] = ...) -> None: ...

class SearchConceptsResponse(_message.Message):
    __slots__ = ("concepts", "unsearched")
    CONCEPTS_FIELD_NUMBER: _ClassVar[int]
    UNSEARCHED_FIELD_NUMBER: _ClassVar[int]
    concepts: _containers.RepeatedCompositeFieldContainer[FoundConcept]
    unsearched: _containers.RepeatedCompositeFieldContainer[UnsearchedBank]
    def __init__(self, concepts: _Optional[_Iterable[_Union[FoundConcept, _Mapping]]] = ..., unsearched: _Optional[_Iterable[_Union[UnsearchedBank, _Mapping]]] = ...) -> None: ...

class FoundConcept(_message.Message):
    __slots__ = ("concept", "bank", "score")
    CONCEPT_FIELD_NUMBER: _ClassVar[int]
    BANK_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    concept: _bank_pb2.Concept
    bank: _explanation_pb2.BankVersion
    score: float
    def __init__(self, concept: _Optional[_Union[_bank_pb2.Concept, _Mapping]] = ..., bank: _Optional[_Union[_explanation_pb2.BankVersion, _Mapping]] = ..., score: _Optional[float] = ...) -> None: ...

class UnsearchedBank(_message.Message):
    __slots__ = ("reference", "reason")
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    reference: str
    reason: str
    def __init__(self, reference: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class GetServerInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetServerInfoResponse(_message.Message):
    __slots__ = ("version", "contract_revision", "limits")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CONTRACT_REVISION_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    version: str
    contract_revision: ContractRevision
    limits: Limits
    def __init__(self, version: _Optional[str] = ..., contract_revision: _Optional[_Union[ContractRevision, str]] = ..., limits: _Optional[_Union[Limits, _Mapping]] = ...) -> None: ...

class Limits(_message.Message):
    __slots__ = ("request_bytes", "reply_bytes", "pixels", "image_formats", "top_k", "scales", "stream_in_flight", "deadline", "default_deadline")
    REQUEST_BYTES_FIELD_NUMBER: _ClassVar[int]
    REPLY_BYTES_FIELD_NUMBER: _ClassVar[int]
    PIXELS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FORMATS_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    STREAM_IN_FLIGHT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_FIELD_NUMBER: _ClassVar[int]
    DEFAULT_DEADLINE_FIELD_NUMBER: _ClassVar[int]
    request_bytes: int
    reply_bytes: int
    pixels: int
    image_formats: _containers.RepeatedScalarFieldContainer[str]
    top_k: int
    scales: int
    stream_in_flight: int
    deadline: _duration_pb2.Duration
    default_deadline: _duration_pb2.Duration
    def __init__(self, request_bytes: _Optional[int] = ..., reply_bytes: _Optional[int] = ..., pixels: _Optional[int] = ..., image_formats: _Optional[_Iterable[str]] = ..., top_k: _Optional[int] = ..., scales: _Optional[int] = ..., stream_in_flight: _Optional[int] = ..., deadline: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ..., default_deadline: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...
