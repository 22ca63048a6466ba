from whence.v1 import image_pb2 as _image_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Order(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ORDER_UNSPECIFIED: _ClassVar[Order]
    ORDER_CONTRIBUTION: _ClassVar[Order]
    ORDER_ACTIVATION: _ClassVar[Order]

class Estimator(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ESTIMATOR_UNSPECIFIED: _ClassVar[Estimator]
    ESTIMATOR_GRADIENT: _ClassVar[Estimator]
    ESTIMATOR_INTEGRATED: _ClassVar[Estimator]
    ESTIMATOR_ABLATION: _ClassVar[Estimator]

class InputMethod(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    INPUT_METHOD_UNSPECIFIED: _ClassVar[InputMethod]
    INPUT_METHOD_GRADIENT: _ClassVar[InputMethod]
    INPUT_METHOD_SMOOTHGRAD: _ClassVar[InputMethod]
    INPUT_METHOD_INTEGRATED: _ClassVar[InputMethod]

class ConceptScope(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONCEPT_SCOPE_UNSPECIFIED: _ClassVar[ConceptScope]
    CONCEPT_SCOPE_TARGET: _ClassVar[ConceptScope]
    CONCEPT_SCOPE_ALL: _ClassVar[ConceptScope]

class MapKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MAP_KIND_UNSPECIFIED: _ClassVar[MapKind]
    MAP_KIND_ACTIVATION: _ClassVar[MapKind]
    MAP_KIND_CONTRIBUTION: _ClassVar[MapKind]
    MAP_KIND_INPUT: _ClassVar[MapKind]

class MapSize(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MAP_SIZE_UNSPECIFIED: _ClassVar[MapSize]
    MAP_SIZE_GRID: _ClassVar[MapSize]
    MAP_SIZE_IMAGE: _ClassVar[MapSize]

class MapEncoding(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    MAP_ENCODING_UNSPECIFIED: _ClassVar[MapEncoding]
    MAP_ENCODING_FLOAT16: _ClassVar[MapEncoding]
    MAP_ENCODING_PNG_OVERLAY: _ClassVar[MapEncoding]
    MAP_ENCODING_FLOAT32: _ClassVar[MapEncoding]

class Exactness(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    EXACTNESS_UNSPECIFIED: _ClassVar[Exactness]
    EXACTNESS_EXACT: _ClassVar[Exactness]
    EXACTNESS_FIRST_ORDER: _ClassVar[Exactness]
ORDER_UNSPECIFIED: Order
ORDER_CONTRIBUTION: Order
ORDER_ACTIVATION: Order
ESTIMATOR_UNSPECIFIED: Estimator
ESTIMATOR_GRADIENT: Estimator
ESTIMATOR_INTEGRATED: Estimator
ESTIMATOR_ABLATION: Estimator
INPUT_METHOD_UNSPECIFIED: InputMethod
INPUT_METHOD_GRADIENT: InputMethod
INPUT_METHOD_SMOOTHGRAD: InputMethod
INPUT_METHOD_INTEGRATED: InputMethod
CONCEPT_SCOPE_UNSPECIFIED: ConceptScope
CONCEPT_SCOPE_TARGET: ConceptScope
CONCEPT_SCOPE_ALL: ConceptScope
MAP_KIND_UNSPECIFIED: MapKind
MAP_KIND_ACTIVATION: MapKind
MAP_KIND_CONTRIBUTION: MapKind
MAP_KIND_INPUT: MapKind
MAP_SIZE_UNSPECIFIED: MapSize
MAP_SIZE_GRID: MapSize
MAP_SIZE_IMAGE: MapSize
MAP_ENCODING_UNSPECIFIED: MapEncoding
MAP_ENCODING_FLOAT16: MapEncoding
MAP_ENCODING_PNG_OVERLAY: MapEncoding
MAP_ENCODING_FLOAT32: MapEncoding
EXACTNESS_UNSPECIFIED: Exactness
EXACTNESS_EXACT: Exactness
EXACTNESS_FIRST_ORDER: Exactness

class ExplainOptions(_message.Message):
    __slots__ = ("top_k", "order", "estimator", "maps", "map_size", "map_encoding", "substitute", "colours", "input_method", "concepts", "parts")
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    ORDER_FIELD_NUMBER: _ClassVar[int]
    ESTIMATOR_FIELD_NUMBER: _ClassVar[int]
    MAPS_FIELD_NUMBER: _ClassVar[int]
    MAP_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAP_ENCODING_FIELD_NUMBER: _ClassVar[int]
    SUBSTITUTE_FIELD_NUMBER: _ClassVar[int]
    COLOURS_FIELD_NUMBER: _ClassVar[int]
    INPUT_METHOD_FIELD_NUMBER: _ClassVar[int]
    CONCEPTS_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    top_k: int
    order: Order
    estimator: Estimator
    maps: _containers.RepeatedScalarFieldContainer[MapKind]
    map_size: MapSize
    map_encoding: MapEncoding
    substitute: bool
    colours: bool
    input_method: InputMethod
    concepts: ConceptScope
    parts: bool
    def __init__(self, top_k: _Optional[int] = ..., order: _Optional[_Union[Order, str]] = ..., estimator: _Optional[_Union[Estimator, str]] = ..., maps: _Optional[_Iterable[_Union[MapKind, str]]] = ..., map_size: _Optional[_Union[MapSize, str]] = ..., map_encoding: _Optional[_Union[MapEncoding, str]] = ..., substitute: _Optional[bool] = ..., colours: _Optional[bool] = ..., input_method: _Optional[_Union[InputMethod, str]] = ..., concepts: _Optional[_Union[ConceptScope, str]] = ..., parts: _Optional[bool] = ...) -> None: ...

class Target(_message.Message):
    __slots__ = ("index", "name")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    index: int
    name: str
    def __init__(self, index: _Optional[int] = ..., name: _Optional[str] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("model", "bank", "predictions", "target", "concepts", "unexplained", "contributions_total", "faithfulness", "timings", "view", "runtime", "estimator", "substitute", "parts", "scope")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    BANK_FIELD_NUMBER: _ClassVar[int]
    PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    CONCEPTS_FIELD_NUMBER: _ClassVar[int]
    UNEXPLAINED_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    FAITHFULNESS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    VIEW_FIELD_NUMBER: _ClassVar[int]
    RUNTIME_FIELD_NUMBER: _ClassVar[int]
    ESTIMATOR_FIELD_NUMBER: _ClassVar[int]
    SUBSTITUTE_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    SCOPE_FIELD_NUMBER: _ClassVar[int]
    model: ModelVersion
    bank: BankVersion
    predictions: _containers.RepeatedCompositeFieldContainer[ClassScore]
    target: ClassScore
    concepts: _containers.RepeatedCompositeFieldContainer[ConceptScore]
    unexplained: float
    contributions_total: float
    faithfulness: FaithfulnessReport
    timings: Timings
    view: _image_pb2.Box
    runtime: str
    estimator: Estimator
    substitute: bool
    parts: PartsReport
    scope: ConceptScope
    def __init__(self, model: _Optional[_Union[ModelVersion, _Mapping]] = ..., bank: _Optional[_Union[BankVersion, _Mapping]] = ..., predictions: _Optional[_Iterable[_Union[ClassScore, _Mapping]]] = ..., target: _Optional[_Union[ClassScore, _Mapping]] = ..., concepts: _Optional[_Iterable[_Union[ConceptScore, _Mapping]]] = ..., unexplained: _Optional[float] = ..., contributions_total: _Optional[float] = ..., faithfulness: _Optional[_Union[FaithfulnessReport, _Mapping]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., view: _Optional[_Union[_image_pb2.Box, _Mapping]] = ..., runtime: _Optional[str] = ..., estimator: _Optional[_Union[Estimator, str]] = ..., substitute: _Optional[bool] = ..., parts: _Optional[_Union[PartsReport, _Mapping]] = ..., scope: _Optional[_Union[ConceptScope, str]] = ...) -> None: ...

class PartsReport(_message.Message):
    __slots__ = ("layer", "contributions_total", "unexplained", "faithfulness")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTIONS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    UNEXPLAINED_FIELD_NUMBER: _ClassVar[int]
    FAITHFULNESS_FIELD_NUMBER: _ClassVar[int]
    layer: str
    contributions_total: float
    unexplained: float
    faithfulness: FaithfulnessReport
    def __init__(self, layer: _Optional[str] = ..., contributions_total: _Optional[float] = ..., unexplained: _Optional[float] = ..., faithfulness: _Optional[_Union[FaithfulnessReport, _Mapping]] = ...) -> None: ...

class ModelVersion(_message.Message):
    __slots__ = ("name", "digest")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class BankVersion(_message.Message):
    __slots__ = ("reference", "digest")
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    reference: str
    digest: str
    def __init__(self, reference: _Optional[str] = ..., digest: _Optional[str] = ...) -> None: ...

class ClassScore(_message.Message):
    __slots__ = ("index", "name", "logit", "probability")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    LOGIT_FIELD_NUMBER: _ClassVar[int]
    PROBABILITY_FIELD_NUMBER: _ClassVar[int]
    index: int
    name: str
    logit: float
    probability: float
    def __init__(self, index: _Optional[int] = ..., name: _Optional[str] = ..., logit: _Optional[float] = ..., probability: _Optional[float] = ...) -> None: ...

class ConceptScore(_message.Message):
    __slots__ = ("id", "label", "activation", "peak", "contribution", "share", "maps", "parts", "class_index", "class_name", "weak_label", "words")
    ID_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    PEAK_FIELD_NUMBER: _ClassVar[int]
    CONTRIBUTION_FIELD_NUMBER: _ClassVar[int]
    SHARE_FIELD_NUMBER: _ClassVar[int]
    MAPS_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    CLASS_INDEX_FIELD_NUMBER: _ClassVar[int]
    CLASS_NAME_FIELD_NUMBER: _ClassVar[int]
    WEAK_LABEL_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    id: int
    label: str
    activation: float
    peak: float
    contribution: float
    share: float
    maps: _containers.RepeatedCompositeFieldContainer[Map]
    parts: _containers.RepeatedCompositeFieldContainer[ConceptScore]
    class_index: int
    class_name: str
    weak_label: bool
    words: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, id: _Optional[int] = ..., label: _Optional[str] = ..., activation: _Optional[float] = ..., peak: _Optional[float] = ..., contribution: _Optional[float] = ..., share: _Optional[float] = ..., maps: _Optional[_Iterable[_Union[Map, _Mapping]]] = ..., parts: _Optional[_Iterable[_Union[ConceptScore, _Mapping]]] = ..., class_index: _Optional[int] = ..., class_name: _Optional[str] = ..., weak_label: _Optional[bool] = ..., words: _Optional[_Iterable[str]] = ...) -> None: ...

class Map(_message.Message):
    __slots__ = ("kind", "height", "width", "encoding", "data", "class_token", "colours")
    KIND_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    ENCODING_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    CLASS_TOKEN_FIELD_NUMBER: _ClassVar[int]
    COLOURS_FIELD_NUMBER: _ClassVar[int]
    kind: MapKind
    height: int
    width: int
    encoding: MapEncoding
    data: bytes
    class_token: float
    colours: bytes
    def __init__(self, kind: _Optional[_Union[MapKind, str]] = ..., height: _Optional[int] = ..., width: _Optional[int] = ..., encoding: _Optional[_Union[MapEncoding, str]] = ..., data: _Optional[bytes] = ..., class_token: _Optional[float] = ..., colours: _Optional[bytes] = ...) -> None: ...

class FaithfulnessReport(_message.Message):
    __slots__ = ("relative_error", "kl", "top1_agrees", "completeness_residual", "constant", "exactness", "exactness_reason", "carried_share", "integration_error", "code_tolerance", "explained_logit", "input_maps")
    RELATIVE_ERROR_FIELD_NUMBER: _ClassVar[int]
    KL_FIELD_NUMBER: _ClassVar[int]
    TOP1_AGREES_FIELD_NUMBER: _ClassVar[int]
    COMPLETENESS_RESIDUAL_FIELD_NUMBER: _ClassVar[int]
    CONSTANT_FIELD_NUMBER: _ClassVar[int]
    EXACTNESS_FIELD_NUMBER: _ClassVar[int]
    EXACTNESS_REASON_FIELD_NUMBER: _ClassVar[int]
    CARRIED_SHARE_FIELD_NUMBER: _ClassVar[int]
    INTEGRATION_ERROR_FIELD_NUMBER: _ClassVar[int]
    CODE_TOLERANCE_FIELD_NUMBER: _ClassVar[int]
    EXPLAINED_LOGIT_FIELD_NUMBER: _ClassVar[int]
    INPUT_MAPS_FIELD_NUMBER: _ClassVar[int]
    relative_error: float
    kl: float
    top1_agrees: bool
    completeness_residual: float
    constant: float
    exactness: Exactness
    exactness_reason: str
    carried_share: float
    integration_error: float
    code_tolerance: float
    explained_logit: float
    input_maps: InputMapReport
    def __init__(self, relative_error: _Optional[float] = ..., kl: _Optional[float] = ..., top1_agrees: _Optional[bool] = ..., completeness_residual: _Optional[float] = ..., constant: _Optional[float] = ..., exactness: _Optional[_Union[Exactness, str]] = ..., exactness_reason: _Optional[str] = ..., carried_share: _Optional[float] = ..., integration_error: _Optional[float] = ..., code_tolerance: _Optional[float] = ..., explained_logit: _Optional[float] = ..., input_maps: _Optional[_Union[InputMapReport, _Mapping]] = ...) -> None: ...

class InputMapReport(_message.Message):
    __slots__ = ("exactness", "reason", "residual", "method", "completeness_residual")
    EXACTNESS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    RESIDUAL_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    COMPLETENESS_RESIDUAL_FIELD_NUMBER: _ClassVar[int]
    exactness: Exactness
    reason: str
    residual: float
    method: InputMethod
    completeness_residual: float
    def __init__(self, exactness: _Optional[_Union[Exactness, str]] = ..., reason: _Optional[str] = ..., residual: _Optional[float] = ..., method: _Optional[_Union[InputMethod, str]] = ..., completeness_residual: _Optional[float] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("decode_ms", "queue_ms", "trunk_ms", "head_ms", "codes_ms", "explain_ms", "encode_ms", "total_ms", "batch_size")
    DECODE_MS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    TRUNK_MS_FIELD_NUMBER: _ClassVar[int]
    HEAD_MS_FIELD_NUMBER: _ClassVar[int]
    CODES_MS_FIELD_NUMBER: _ClassVar[int]
    EXPLAIN_MS_FIELD_NUMBER: _ClassVar[int]
    ENCODE_MS_FIELD_NUMBER: _ClassVar[int]
    TOTAL_MS_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    decode_ms: float
    queue_ms: float
    trunk_ms: float
    head_ms: float
    codes_ms: float
    explain_ms: float
    encode_ms: float
    total_ms: float
    batch_size: int
    def __init__(self, decode_ms: _Optional[float] = ..., queue_ms: _Optional[float] = ..., trunk_ms: _Optional[float] = ..., head_ms: _Optional[float] = ..., codes_ms: _Optional[float] = ..., explain_ms: _Optional[float] = ..., encode_ms: _Optional[float] = ..., total_ms: _Optional[float] = ..., batch_size: _Optional[int] = ...) -> None: ...
