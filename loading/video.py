"""Videos in files and in folders of frames: exact access to single frames.

Files are decoded by PyAV, whose wheels bring FFmpeg with them (torchcodec needs FFmpeg's libraries
to be installed on the machine). A video is told by its packets, not by what its header says of its
length: they are listed without being decoded, and sorted by the time at which their frames are
shown. Wanted frames are then reached from the last key frame before them.

T frames; H, W pixels, upright.
"""

import bisect
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

from utils.errors import first_line, printable

from .depth import Depth, Range
from .frames import frames_of_part
from .images import BadImageError, check_size, file_range, read_file, read_image

if TYPE_CHECKING:  # PyAV is imported where a file is opened: all else runs without it
    from av import VideoFrame
    from av.video.reformatter import VideoReformatter

MAX_CLIP_PIXELS = 2_000_000_000  # of all frames that are read together, 3 bytes each
VIDEO_EXTENSIONS = (
    ".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".wmv", ".flv", ".3gp",
    ".ogv",
)  # fmt: skip


class Video:
    """A video whose frames are read by number."""

    def __len__(self) -> int:
        """The number of frames. Raises `BadImageError`."""
        raise NotImplementedError

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """Frames by number, in any order, also several times: [T, H, W, 3] uint8, RGB.

        Raises `BadImageError`.
        """
        raise NotImplementedError


class VideoPart(Video):
    """A stretch of a long video.

    start, end: in seconds.
    """

    def __init__(self, video: "VideoFile", start: float, end: float):
        self.video, self.start, self.end = video, start, end

    def _frames(self) -> range:
        """Raises `BadImageError` if the video ends before the part begins."""
        rate, frames = self.video.rate, len(self.video)
        if int(self.start * rate) >= frames:
            raise BadImageError(
                f"it ends at {frames / rate:g} s, and its list has a part from {self.start:g} s on"
            )
        return frames_of_part(self.start, self.end, rate, frames)

    def __len__(self) -> int:
        return len(self._frames())

    def read(self, indices: Sequence[int]) -> np.ndarray:
        frames = self._frames()
        return self.video.read([frames[index] for index in indices])


class VideoFile(Video):
    """A video in a file of any container and codec that FFmpeg knows.

    A rotation in the display matrix is applied, transparency is dropped, and 10-bit frames become
    8-bit ones.

    span: first byte and end of the video in the file, such as a tar file; None for all of it.
    """

    def __init__(self, path: str, span: tuple[int, int] | None = None):
        self.path, self.span = path, span
        self._listed: _Listing | None = None

    def __len__(self) -> int:
        return len(self._listing().times)

    @property
    def rate(self) -> float:
        """Frames a second, on average. Raises `BadImageError` where the file does not tell."""
        listing = self._listing()
        if not listing.rate:
            raise BadImageError("it does not say how fast it is played")
        return listing.rate

    def _listing(self) -> "_Listing":
        if self._listed is None:
            with _opened(self.path, self.span) as (container, stream):
                self._listed = _list_frames(container, stream)
        return self._listed

    def read(self, indices: Sequence[int]) -> np.ndarray:
        wanted = sorted(set(indices))
        frames = self._decode(wanted, seek=self._listing().timed)
        missing = [index for index in wanted if index not in frames]
        if missing:  # some containers seek too far
            frames |= self._decode(missing, seek=False)
        for index in missing:
            if index not in frames:
                raise BadImageError(f"frame {index} of {len(self)} cannot be decoded")
        if len({frame.shape for frame in frames.values()}) > 1:
            raise BadImageError("its frames change their size")
        return np.stack([frames[index] for index in indices])

    def _decode(self, wanted: Sequence[int], seek: bool) -> dict[int, np.ndarray]:
        """Those of the wanted frames, ascending, that are found on a way through the file."""
        from av.video.reformatter import VideoReformatter

        listing, found, place = self._listing(), {}, None
        converter = VideoReformatter()  # prepared once for all frames of a size
        with _opened(self.path, self.span) as (container, stream):
            _check_clip(stream.codec_context.width, stream.codec_context.height, len(wanted))
            decoded = _frames(container, stream, listing)
            for index in wanted:
                time = listing.times[index]
                key = listing.key_before(time)
                if seek and (place is None or key > place):
                    container.seek(key, stream=stream)
                    decoded = _frames(container, stream, listing)
                elif place is not None and place >= time:
                    continue
                for place, frame in decoded:
                    if place == time:
                        found[index] = _pixels(frame, converter)
                    if place >= time:
                        break
        return found


def _check_clip(width: int, height: int, frames: int) -> None:
    check_size(width, height)
    pixels = width * height
    if pixels * frames > MAX_CLIP_PIXELS:
        raise BadImageError(
            f"too large: {frames} frames of {pixels:,} pixels, at most {MAX_CLIP_PIXELS:,} in all"
        )


class _Listing:
    """When the frames of a stream are shown, and which of these are key frames.

    rate: frames a second, 0 if unknown.
    timed: False if the packets have no times; frames are then counted from the first one.
    """

    def __init__(self, times: list[int], keys: list[int], rate: float, timed: bool = True):
        self.times, self.keys, self.rate, self.timed = times, keys, rate, timed

    def key_before(self, time: int) -> int:
        """The time of the last key frame up to `time`."""
        return self.keys[max(bisect.bisect_right(self.keys, time) - 1, 0)]


def _list_frames(container, stream) -> _Listing:
    """Lists the packets; decodes all frames only if a packet does not say when it is shown."""
    packets = [  # without their data
        (packet.pts, packet.is_keyframe)
        for packet in container.demux(stream)
        if packet.size and not packet.is_discard
    ]
    if any(time is None for time, _ in packets):
        container.seek(0)
        count = sum(1 for _ in container.decode(stream))
        listing = _Listing(list(range(count)), [0], float(stream.average_rate or 0), timed=False)
    else:
        keys = sorted({time for time, is_key in packets if is_key})
        # What is shown before the first key frame cannot be decoded.
        times = sorted({time for time, _ in packets if keys and time >= keys[0]})
        rate = float(stream.average_rate or 0)
        if len(times) > 1:
            rate = float((len(times) - 1) / ((times[-1] - times[0]) * stream.time_base))
        listing = _Listing(times, keys, rate)
    if not listing.times:
        raise BadImageError("it has no frames")
    return listing


def _frames(container, stream, listing: _Listing) -> Iterator[tuple[int, "VideoFrame"]]:
    """(time or number, frame) from where the container stands."""
    for number, frame in enumerate(container.decode(stream)):
        place = frame.pts if listing.timed else number
        if place is not None:
            yield place, frame


def _pixels(frame: "VideoFrame", converter: "VideoReformatter") -> np.ndarray:
    """A frame, upright: [H, W, 3] uint8."""
    turns = round(frame.rotation / 90) % 4
    pixels = converter.reformat(frame, format="rgb24", threads=1).to_ndarray()
    return np.ascontiguousarray(np.rot90(pixels, turns))


@contextmanager
def _opened(path: str, span: tuple[int, int] | None):
    """The container and its video stream; whatever FFmpeg reports becomes a `BadImageError`."""
    import av
    from av.stream import Disposition

    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadImageError("not a regular file")
        if status.st_size == 0:
            raise BadImageError("the file is empty")
        source, protocols = f"file:{path}", "file"
        if span is not None:
            source = "subfile,,start,{},end,{},,:{}".format(*span, source)
            protocols = "file,subfile"
        # A playlist could name other files and hosts.
        options = {"protocol_whitelist": protocols}
        with av.open(source, options=options, metadata_errors="replace") as container:
            streams = [
                stream
                for stream in container.streams.video
                if not stream.disposition & Disposition.attached_pic
            ]
            if not streams:
                raise BadImageError("it has no video stream")
            if streams[0].codec_context is None:
                raise BadImageError("FFmpeg knows no decoder of its codec")
            streams[0].codec_context.thread_count = 1  # there is a process for each core
            yield container, streams[0]
    except BadImageError:
        raise
    except MemoryError:
        raise BadImageError("not enough memory to decode it") from None
    except (av.FFmpegError, OSError, ValueError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise BadImageError(printable(reason)) from None


class FrameFolder(Video):
    """A video as a folder of image files, one for each frame.

    paths: in the order of the frames.
    depth: of files with more than 8 bits a channel.
    """

    def __init__(self, paths: Sequence[str], depth: Depth | None = None):
        self.paths, self.depth = paths, depth

    def range(self) -> Range | None:
        """`file_range` of the frame in the middle."""
        return read_file(self.paths[len(self.paths) // 2], file_range)

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        frames: dict[int, np.ndarray] = {}
        for index in set(indices):
            frames[index] = np.asarray(read_image(self.paths[index], self.depth))
            _check_clip(frames[index].shape[1], frames[index].shape[0], len(set(indices)))
        if len({frame.shape for frame in frames.values()}) > 1:
            raise BadImageError("its frames differ in size")
        return np.stack([frames[index] for index in indices])
