"""What the pipeline's results depend on beside the log."""

import hashlib

import msgspec

from processors.detectors.registry import Thresholds, WrongThreshold, thresholds
from schemas import topics
from schemas.events import MINUTE_NS, NS_PER_S
from schemas.topics import Topic
from tapedeck.errors import UsageError
from tapedeck.settings import Settings

VERSION = "5"


class PipelineSettings(msgspec.Struct, frozen=True):
    """`lateness_ns`: how far behind the last tick a trade may be and still change its bar. `grace_ns`: how
    long after its end a bar waits for trades. `ahead_ns`: further past the last tick is quarantined.
    `detectors`: the thresholds of each, by kind. `outputs`: the topics to fill, none for all; what is in them does
    not depend on it, so it is not in the fingerprint."""

    lateness_ns: int = 15 * MINUTE_NS
    grace_ns: int = 2 * NS_PER_S
    ahead_ns: int = 10 * NS_PER_S
    detectors: Thresholds = msgspec.field(default_factory=thresholds)
    outputs: tuple[str, ...] = ()

    def fills(self, topic: Topic) -> bool:
        return not self.outputs or topic.name in self.outputs

    def fingerprint(self) -> str:
        """Eight hex digits that name the pipeline's version and settings; bars and markers carry it."""
        text = VERSION.encode() + msgspec.json.encode(msgspec.structs.replace(self, outputs=()))
        return hashlib.blake2b(text, digest_size=4).hexdigest()


def chosen(settings: Settings) -> PipelineSettings:
    """What the operator chose. Raises UsageError for thresholds that there are not."""
    try:
        detectors = thresholds(settings.anomalies)
    except WrongThreshold as error:
        raise UsageError(f"wrong setting: ANOMALIES: {error}") from None
    if unknown := set(settings.outputs) - {topic.name for topic in topics.ALL}:
        raise UsageError(f"wrong setting: OUTPUTS: there is no topic {', '.join(sorted(unknown))}")
    outputs = tuple(settings.outputs)
    return PipelineSettings(settings.lateness_ns, settings.grace_ns, detectors=detectors, outputs=outputs)
