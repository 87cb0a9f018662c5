"""Every error a caller can see, with its HTTP status, its stable code and the next step.

::

    VoiceCloneError
    + InvalidRequest 400            invalid_request_error
      - MissingField · InvalidValue · InputEmpty · InputTooLong · UnsupportedLanguage
      - UnsupportedFormat · UnsupportedOption · InvalidJson · ConflictingFields · FeatureDisabled
      - LanguageNeeded · TranscriptNeeded
    + Unauthenticated 401           authentication_error
    + Forbidden 403                 permission_error
      - ConsentRequired · VoiceForbidden · HostNotAllowed · OriginNotAllowed
    + NotFound 404                  not_found_error
      - ModelNotFound · VoiceNotFound · ConsentNotFound · RouteNotFound · NodeNotFound
      - AnnouncementNotFound
    + MethodNotAllowed 405          invalid_request_error
    + Gone 410                      invalid_request_error
    + ScalesItself 409              conflict_error
    + VoiceExists 409               conflict_error
    + TooManyVoices 409             conflict_error
    + BodyTooLarge 413              invalid_request_error
    + UnsupportedAudio 415          invalid_request_error
    + JsonExpected 415              invalid_request_error
    + UnusableAudio 422             invalid_request_error
      - AudioUndecodable · AudioTooShort · AudioTooLong · NoSpeechDetected · AudioDecodeLimit
    + RateLimited 429               rate_limit_error
      - TooManyAtOnce
    + InternalError 500             server_error
      - EngineFailed
    + Unavailable 503               server_error
      - Overloaded · QueueTimeout · EngineUnavailable · ShuttingDown · StoreUnavailable · VoiceDamaged
      - TranscriberUnavailable
    + ListenerStalled 408           timeout_error
    + StorageFull 507               server_error

``message`` is one or two sentences that end with the next step. It never holds a path, a library's words, a
traceback or the value that was sent. How an error looks on the wire is each dialect's business (``ingress``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from engines import contract


@dataclass(frozen=True, slots=True)
class ReachedLimit:
    """The limit that refused a request, as clients are told of it in headers."""

    #: What is counted and over whom: "requests-per-ip".
    policy: str
    #: "requests", "characters" or "concurrent".
    counts: str
    #: Units allowed in the window, or at once where there is no window.
    quota: int
    remaining: int
    window_s: float | None = None


class VoiceCloneError(Exception):
    """Base of the tree. ``param`` names the request field at fault, ``limit`` the limit that was reached."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str] = "internal_error"
    title: ClassVar[str] = "Internal error"
    #: Whether sending the same request again can help. Clients are told by a header.
    retryable: ClassVar[bool] = False

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        limit: ReachedLimit | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s
        self.limit = limit

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process boundaries; the default would drop the keyword arguments.
        return (_rebuild, (type(self), self.message, self.param, self.retry_after_s, self.limit))


def _rebuild(
    kind: type[VoiceCloneError],
    message: str,
    param: str | None,
    retry_after_s: float | None,
    limit: ReachedLimit | None,
) -> VoiceCloneError:
    return kind(message, param=param, retry_after_s=retry_after_s, limit=limit)


class InvalidRequest(VoiceCloneError):
    """The request cannot be understood or fulfilled as written."""

    status = 400
    type = "invalid_request_error"
    code = "invalid_request"
    title = "Invalid request"


class InvalidJson(InvalidRequest):
    """The body is not a JSON object."""

    code = "invalid_json"
    title = "Invalid JSON"


class MissingField(InvalidRequest):
    """A required field is absent."""

    code = "missing_field"
    title = "Missing field"


class InvalidValue(InvalidRequest):
    """A field has the wrong type or is out of range."""

    code = "invalid_value"
    title = "Invalid value"


class InputEmpty(InvalidRequest):
    """Nothing in the text can be spoken."""

    code = "input_empty"
    title = "Nothing to speak"


class InputTooLong(InvalidRequest):
    """The text is longer than the limit."""

    code = "input_too_long"
    title = "Input too long"


class UnsupportedLanguage(InvalidRequest):
    """The engine does not speak this language."""

    code = "unsupported_language"
    title = "Unsupported language"


class UnsupportedFormat(InvalidRequest):
    """No such audio format."""

    code = "unsupported_format"
    title = "Unsupported format"


class UnsupportedOption(InvalidRequest):
    """The engine lacks an option that was asked for."""

    code = "unsupported_option"
    title = "Unsupported option"


class ConflictingFields(InvalidRequest):
    """Two fields that exclude each other."""

    code = "conflicting_fields"
    title = "Conflicting fields"


class FeatureDisabled(InvalidRequest):
    """Something this server does not do for anybody."""

    code = "feature_disabled"
    title = "Feature disabled"


class LanguageNeeded(InvalidRequest):
    """The language of a recording cannot be found out here."""

    code = "language_needed"
    title = "Language needed"


class TranscriptNeeded(InvalidRequest):
    """The engine needs to know what is said in the recording, and nobody here can hear it."""

    code = "transcript_needed"
    title = "Transcript needed"


class Unauthenticated(VoiceCloneError):
    """No API key, or a wrong one."""

    status = 401
    type = "authentication_error"
    code = "invalid_api_key"
    title = "Unauthenticated"


class Forbidden(VoiceCloneError):
    """Known caller, but not allowed."""

    status = 403
    type = "permission_error"
    code = "forbidden"
    title = "Forbidden"


class ConsentRequired(Forbidden):
    """The operator demands a consent statement for every enrolment."""

    code = "consent_required"
    title = "Consent required"


class VoiceForbidden(Forbidden):
    """A voice that the caller may use but not change."""

    code = "voice_forbidden"
    title = "Voice of another owner"


class HostNotAllowed(Forbidden):
    """A name this server is not known by: a web page may have made it point here."""

    code = "host_not_allowed"
    title = "Host not allowed"


class OriginNotAllowed(Forbidden):
    """The request comes from a page of another site."""

    code = "origin_not_allowed"
    title = "Origin not allowed"


class NotFound(VoiceCloneError):
    """Something named in the request does not exist."""

    status = 404
    type = "not_found_error"
    code = "not_found"
    title = "Not found"


class ModelNotFound(NotFound):
    """No engine of that name is served."""

    code = "model_not_found"
    title = "Model not found"


class VoiceNotFound(NotFound):
    """No voice of that id, name or alias."""

    code = "voice_not_found"
    title = "Voice not found"


class ConsentNotFound(NotFound):
    """No consent of that id."""

    code = "consent_not_found"
    title = "Consent not found"


class RouteNotFound(NotFound):
    """No such path."""

    code = "route_not_found"
    title = "No such route"


class NodeNotFound(NotFound):
    """No replica of that id."""

    code = "node_not_found"
    title = "Node not found"


class AnnouncementNotFound(NotFound):
    """No announcement of that id."""

    code = "announcement_not_found"
    title = "Announcement not found"


class Gone(VoiceCloneError):
    """A route of the old system that has nothing to do any more."""

    status = 410
    type = "invalid_request_error"
    code = "gone"
    title = "Gone"


class ScalesItself(VoiceCloneError):
    """The number of replicas of this engine is not for clients to say."""

    status = 409
    type = "conflict_error"
    code = "scales_itself"
    title = "Engine scales itself"


class MethodNotAllowed(VoiceCloneError):
    """The path exists, but not with this method."""

    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"
    title = "Method not allowed"


class VoiceExists(VoiceCloneError):
    """A voice of this name is enrolled already."""

    status = 409
    type = "conflict_error"
    code = "voice_exists"
    title = "Voice exists"


class TooManyVoices(VoiceCloneError):
    """The owner has as many voices as are allowed."""

    status = 409
    type = "conflict_error"
    code = "too_many_voices"
    title = "Too many voices"


class BodyTooLarge(VoiceCloneError):
    """The request body is larger than the limit."""

    status = 413
    type = "invalid_request_error"
    code = "body_too_large"
    title = "Body too large"


class UnsupportedAudio(VoiceCloneError):
    """The bytes are not in an accepted audio container."""

    status = 415
    type = "invalid_request_error"
    code = "unsupported_media_type"
    title = "Unsupported media type"


class JsonExpected(VoiceCloneError):
    """The body is announced as something other than JSON."""

    status = 415
    type = "invalid_request_error"
    code = "json_expected"
    title = "JSON expected"


class UnusableAudio(VoiceCloneError):
    """Audio that decodes, or should, but no voice can be taken from it."""

    status = 422
    type = "invalid_request_error"
    code = "audio_unusable"
    title = "Unusable audio"


class AudioUndecodable(UnusableAudio):
    """The container is known, its content is broken."""

    code = "audio_undecodable"
    title = "Audio cannot be decoded"


class AudioTooShort(UnusableAudio):
    """Less speech than an engine needs."""

    code = "audio_too_short"
    title = "Audio too short"


class AudioTooLong(UnusableAudio):
    """More audio than is accepted."""

    code = "audio_too_long"
    title = "Audio too long"


class NoSpeechDetected(UnusableAudio):
    """Silence or noise only."""

    code = "no_speech_detected"
    title = "No speech detected"


class AudioDecodeLimit(UnusableAudio):
    """Decoding would take more memory or time than is allowed."""

    code = "audio_decode_limit"
    title = "Audio decode limit"


class RateLimited(VoiceCloneError):
    """More in a minute than the caller, or all callers together, may ask for."""

    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"
    title = "Rate limit exceeded"
    retryable = True


class TooManyAtOnce(RateLimited):
    """More requests of one caller at once than it may have."""

    code = "concurrency_limit_exceeded"
    title = "Too many requests at once"


class InternalError(VoiceCloneError):
    """A defect of ours; the log has the details under the request id."""


class EngineFailed(InternalError):
    """The engine could not finish the speech."""

    code = "engine_error"
    title = "Engine failed"
    retryable = True


class Unavailable(VoiceCloneError):
    """Try again later."""

    status = 503
    type = "server_error"
    code = "unavailable"
    title = "Unavailable"
    retryable = True


class Overloaded(Unavailable):
    """More work than the server accepts at once."""

    code = "overloaded"
    title = "Overloaded"


class EngineUnavailable(Unavailable):
    """The engine has no running replica."""

    code = "engine_unavailable"
    title = "Engine unavailable"


class TranscriberUnavailable(Unavailable):
    """The transcriber does not answer."""

    code = "transcriber_unavailable"
    title = "Transcriber unavailable"


class QueueTimeout(Unavailable):
    """The request waited for an engine for as long as it may."""

    code = "queue_timeout"
    title = "Queue timeout"


class ShuttingDown(Unavailable):
    """The server finishes what it has begun and takes nothing new."""

    code = "shutting_down"
    title = "Shutting down"


class StoreUnavailable(Unavailable):
    """The voice store cannot be read or written."""

    code = "store_unavailable"
    title = "Voice store unavailable"


class VoiceDamaged(Unavailable):
    """The voice is in the store but cannot be read."""

    code = "voice_damaged"
    title = "Voice damaged"
    retryable = False


class ListenerStalled(VoiceCloneError):
    """The client has stopped reading its audio. It learns of it by the cut connection."""

    status = 408
    type = "timeout_error"
    code = "listener_stalled"
    title = "Listener stalled"


class StorageFull(VoiceCloneError):
    """No space left for a voice."""

    status = 507
    type = "server_error"
    code = "storage_full"
    title = "Storage full"


_FROM_ENGINE: dict[type[contract.EngineError], type[VoiceCloneError]] = {
    contract.UnsupportedLanguage: UnsupportedLanguage,
    contract.UnsupportedOption: UnsupportedOption,
    contract.UtteranceTooLong: InputTooLong,
    contract.NothingToSpeak: InputEmpty,
    contract.UtteranceError: InvalidRequest,
    contract.ReferenceUnusable: UnusableAudio,
    contract.OutOfMemory: Overloaded,
    contract.ModelError: EngineUnavailable,
    contract.EngineError: EngineFailed,
}


def from_engine(error: contract.EngineError) -> VoiceCloneError:
    """What the client sees of an engine's error."""
    kind = next(_FROM_ENGINE[base] for base in type(error).__mro__ if base in _FROM_ENGINE)
    return kind(str(error))


def from_wire(status: int, body: Mapping[str, Any]) -> VoiceCloneError:
    """The error a server sent, as itself again; an unknown code becomes the nearest base of its status."""
    error = body.get("error")
    error = error if isinstance(error, dict) else {}
    message = str(error.get("message") or f"The server answered with status {status}.")
    kinds = all_kinds(VoiceCloneError)
    same_code = [kind for kind in kinds if kind.code == error.get("code")]
    same_status = [kind for kind in kinds if kind.status == status]
    kind = (same_code or same_status or [VoiceCloneError])[0]
    return kind(message, param=error.get("param"))


def all_kinds(base: type[VoiceCloneError]) -> list[type[VoiceCloneError]]:
    """``base`` and everything derived from it."""
    return [base, *(kind for child in base.__subclasses__() for kind in all_kinds(child))]
