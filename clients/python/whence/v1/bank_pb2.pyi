from google.protobuf import struct_pb2 as _struct_pb2
from whence.v1 import image_pb2 as _image_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class BankKind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BANK_KIND_UNSPECIFIED: _ClassVar[BankKind]
    BANK_KIND_SAE: _ClassVar[BankKind]
    BANK_KIND_NMF: _ClassVar[BankKind]
    BANK_KIND_CONTRAST: _ClassVar[BankKind]
    BANK_KIND_SUBSPACE: _ClassVar[BankKind]
BANK_KIND_UNSPECIFIED: BankKind
BANK_KIND_SAE: BankKind
BANK_KIND_NMF: BankKind
BANK_KIND_CONTRAST: BankKind
BANK_KIND_SUBSPACE: BankKind

class Model(_message.Message):
    __slots__ = ("name", "digest", "architecture", "class_names", "input_height", "input_width")
    NAME_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    CLASS_NAMES_FIELD_NUMBER: _ClassVar[int]
    INPUT_HEIGHT_FIELD_NUMBER: _ClassVar[int]
    INPUT_WIDTH_FIELD_NUMBER: _ClassVar[int]
    name: str
    digest: str
    architecture: str
    class_names: _containers.RepeatedScalarFieldContainer[str]
    input_height: int
    input_width: int
    def __init__(self, name: _Optional[str] = ..., digest: _Optional[str] = ..., architecture: _Optional[str] = ..., class_names: _Optional[_Iterable[str]] = ..., input_height: _Optional[int] = ..., input_width: _Optional[int] = ...) -> None: ...

class Bank(_message.Message):
    __slots__ = ("reference", "digest", "kind", "model", "layer", "name", "concept_count", "channels", "weights_digest", "created", "metrics", "configuration", "parts_layer", "part_count", "labelling")
    REFERENCE_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    CONCEPT_COUNT_FIELD_NUMBER: _ClassVar[int]
    CHANNELS_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CREATED_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    CONFIGURATION_FIELD_NUMBER: _ClassVar[int]
    PARTS_LAYER_FIELD_NUMBER: _ClassVar[int]
    PART_COUNT_FIELD_NUMBER: _ClassVar[int]
    LABELLING_FIELD_NUMBER: _ClassVar[int]
    reference: str
    digest: str
    kind: BankKind
    model: str
    layer: str
    name: str
    concept_count: int
    channels: int
    weights_digest: str
    created: str
    metrics: _struct_pb2.Struct
    configuration: _struct_pb2.Struct
    parts_layer: str
    part_count: int
    labelling: Labelling
    def __init__(self, reference: _Optional[str] = ..., digest: _Optional[str] = ..., kind: _Optional[_Union[BankKind, str]] = ..., model: _Optional[str] = ..., layer: _Optional[str] = ..., name: _Optional[str] = ..., concept_count: _Optional[int] = ..., channels: _Optional[int] = ..., weights_digest: _Optional[str] = ..., created: _Optional[str] = ..., metrics: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., configuration: _Optional[_Union[_struct_pb2.Struct, _Mapping]] = ..., parts_layer: _Optional[str] = ..., part_count: _Optional[int] = ..., labelling: _Optional[_Union[Labelling, _Mapping]] = ...) -> None: ...

class Labelling(_message.Message):
    __slots__ = ("clip", "clip_digest", "captions")
    CLIP_FIELD_NUMBER: _ClassVar[int]
    CLIP_DIGEST_FIELD_NUMBER: _ClassVar[int]
    CAPTIONS_FIELD_NUMBER: _ClassVar[int]
    clip: str
    clip_digest: str
    captions: int
    def __init__(self, clip: _Optional[str] = ..., clip_digest: _Optional[str] = ..., captions: _Optional[int] = ...) -> None: ...

class Concept(_message.Message):
    __slots__ = ("id", "label", "class_index", "class_name", "statistics", "exemplars", "parent", "layer", "children", "other_index", "other_name", "named_by_person", "naming", "counterfactuals")
    class StatisticsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    ID_FIELD_NUMBER: _ClassVar[int]
    LABEL_FIELD_NUMBER: _ClassVar[int]
    CLASS_INDEX_FIELD_NUMBER: _ClassVar[int]
    CLASS_NAME_FIELD_NUMBER: _ClassVar[int]
    STATISTICS_FIELD_NUMBER: _ClassVar[int]
    EXEMPLARS_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    CHILDREN_FIELD_NUMBER: _ClassVar[int]
    OTHER_INDEX_FIELD_NUMBER: _ClassVar[int]
    OTHER_NAME_FIELD_NUMBER: _ClassVar[int]
    NAMED_BY_PERSON_FIELD_NUMBER: _ClassVar[int]
    NAMING_FIELD_NUMBER: _ClassVar[int]
    COUNTERFACTUALS_FIELD_NUMBER: _ClassVar[int]
    id: int
    label: str
    class_index: int
    class_name: str
    statistics: _containers.ScalarMap[str, float]
    exemplars: _containers.RepeatedCompositeFieldContainer[Exemplar]
    parent: int
    layer: str
    children: _containers.RepeatedScalarFieldContainer[int]
    other_index: int
    other_name: str
    named_by_person: bool
    naming: Naming
    counterfactuals: _containers.RepeatedCompositeFieldContainer[Exemplar]
    def __init__(self, id: _Optional[int] = ..., label: _Optional[str] = ..., class_index: _Optional[int] = ..., class_name: _Optional[str] = ..., statistics: _Optional[_Mapping[str, float]] = ..., exemplars: _Optional[_Iterable[_Union[Exemplar, _Mapping]]] = ..., parent: _Optional[int] = ..., layer: _Optional[str] = ..., children: _Optional[_Iterable[int]] = ..., other_index: _Optional[int] = ..., other_name: _Optional[str] = ..., named_by_person: _Optional[bool] = ..., naming: _Optional[_Union[Naming, _Mapping]] = ..., counterfactuals: _Optional[_Iterable[_Union[Exemplar, _Mapping]]] = ...) -> None: ...

class Naming(_message.Message):
    __slots__ = ("label", "score", "weak", "words", "phrases", "counterfactuals")
    LABEL_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    WEAK_FIELD_NUMBER: _ClassVar[int]
    WORDS_FIELD_NUMBER: _ClassVar[int]
    PHRASES_FIELD_NUMBER: _ClassVar[int]
    COUNTERFACTUALS_FIELD_NUMBER: _ClassVar[int]
    label: str
    score: float
    weak: bool
    words: _containers.RepeatedCompositeFieldContainer[Word]
    phrases: _containers.RepeatedCompositeFieldContainer[Word]
    counterfactuals: int
    def __init__(self, label: _Optional[str] = ..., score: _Optional[float] = ..., weak: _Optional[bool] = ..., words: _Optional[_Iterable[_Union[Word, _Mapping]]] = ..., phrases: _Optional[_Iterable[_Union[Word, _Mapping]]] = ..., counterfactuals: _Optional[int] = ...) -> None: ...

class Word(_message.Message):
    __slots__ = ("text", "score")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    SCORE_FIELD_NUMBER: _ClassVar[int]
    text: str
    score: float
    def __init__(self, text: _Optional[str] = ..., score: _Optional[float] = ...) -> None: ...

class Exemplar(_message.Message):
    __slots__ = ("picture", "source", "box", "activation")
    PICTURE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    BOX_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_FIELD_NUMBER: _ClassVar[int]
    picture: bytes
    source: str
    box: _image_pb2.Box
    activation: float
    def __init__(self, picture: _Optional[bytes] = ..., source: _Optional[str] = ..., box: _Optional[_Union[_image_pb2.Box, _Mapping]] = ..., activation: _Optional[float] = ...) -> None: ...
