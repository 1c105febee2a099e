"""Pictures of explanations: overlays, focus maps, strips and stacks of frames; PNG, GIF, MP4, NPZ and HTML files."""
from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .base import Explanation, normalize, upsample
from .files import written

STYLES = ('overlay', 'focus', 'strip', 'stack')
GAP = 4  # pixels between panels
SIDE = 224  # pixels at least of the shorter side of a panel
STRIP = 8  # frames at most that a still picture of a clip shows
Frames = np.ndarray  # uint8, (T, H, W, 3); an image is a clip of one frame


def to_frames(inputs: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Frames:
    """Images (B, C, H, W) or clips (B, C, T, H, W) as uint8 (B, T, H, W, 3).

    With the ``mean`` and ``std`` that normalised them they look as they were; otherwise each one is stretched from its
    minimum to its maximum. One channel is shown as grey, more than three by their mean.
    """
    pixels = inputs.detach().cpu().float()
    pixels = pixels.unsqueeze(2) if pixels.ndim == 4 else pixels
    if mean is not None and std is not None:
        scale, shift = (torch.tensor(values).reshape(1, -1, 1, 1, 1) for values in (std, mean))
        pixels = pixels * scale + shift
    else:
        pixels = normalize(pixels)
    pixels = pixels if pixels.shape[1] == 3 else pixels.mean(1, keepdim=True).expand(-1, 3, -1, -1, -1)
    return (pixels.clamp(0, 1) * 255).round().byte().movedim(1, -1).numpy()


def colours(values: np.ndarray, cmap: str = 'jet') -> np.ndarray:
    """uint8 RGB of ``values`` in 0..1, by 'jet' or, with matplotlib, any of its colour maps."""
    if cmap == 'jet':
        rgb = np.stack([1.5 - np.abs(4 * values - centre) for centre in (3, 2, 1)], -1)
    else:
        try:
            from matplotlib import colormaps
        except ImportError as error:
            raise ImportError(f"the colour map {cmap!r} needs matplotlib: pip install 'timm-softpool[explain]'"
                              ) from error
        if cmap not in colormaps:
            raise ValueError(f"cmap must be 'jet' or one of matplotlib's colour maps, got {cmap!r}")
        rgb = colormaps[cmap](values)[..., :3]
    return (rgb.clip(0, 1) * 255).round().astype(np.uint8)


def visualize_tube(frames: Frames, tube: np.ndarray, *, style: str = 'overlay', cmap: str = 'jet',
                   alpha: float = 0.5) -> Frames:
    """A clip with its tube.

    Args:
        frames: uint8, (T, H, W, 3).
        tube: (T, H, W) in 0..1.
        style: 'overlay', the tube's colours over the frames; 'focus', the frames as bright as the tube, from 20/255 up
            (both as the authors of Saliency Tubes show them); 'strip', overlaid frames side by side; 'stack', one
            behind the other, seen from the side.
        cmap: See `colours`.
        alpha: Of the colours.

    Returns:
        uint8 (T, H, W, 3); of 'strip' and 'stack' a single frame, of another size.
    """
    if style not in STYLES:
        raise ValueError(f'style must be one of {", ".join(STYLES)}, got {style!r}')
    if frames.shape[:3] != tube.shape:
        raise ValueError(f'tube must have the shape {frames.shape[:3]} of the frames, got {tube.shape}')
    check_alpha(alpha)
    if style == 'focus':
        return (frames * ((20 + 235 * tube) / 255)[..., None]).round().astype(np.uint8)
    shown = (alpha * colours(tube, cmap) + (1 - alpha) * frames).round().astype(np.uint8)
    if style == 'overlay':
        return shown
    shown = shown[np.linspace(0, len(shown) - 1, min(STRIP, len(shown))).round().astype(int)]
    if style == 'strip':
        return _side_by_side([shown[[index]] for index in range(len(shown))])
    return _stack(shown)[None]


def _stack(frames: Frames) -> np.ndarray:
    """Frames as sheets that stand one behind the other, the first one in front."""
    count, height, width = frames.shape[:3]
    narrow, rise = width * 3 // 5, width // 5  # a sheet, turned away from the viewer
    step = max(narrow // 2, 1)
    canvas = Image.new('RGB', (narrow + step * (count - 1), height + rise), 'white')
    inverse = (width / narrow, 0, 0, -rise / narrow, 1, 0)
    for position in reversed(range(count)):
        sheet = Image.fromarray(frames[position]).convert('RGBA')
        ImageDraw.Draw(sheet).rectangle((0, 0, width - 1, height - 1), outline='white')
        sheet = sheet.transform((narrow, height + rise), Image.Transform.AFFINE, inverse,
                                Image.Resampling.BILINEAR)
        canvas.paste(sheet, (step * position, 0), sheet)
    return np.asarray(canvas)


def _side_by_side(panels: Sequence[Frames], axis: int = 2) -> Frames:
    """Clips in a row (``axis`` 2) or a column (1), on white; a still one stands beside those that move."""
    length = max(len(panel) for panel in panels)
    extent = max(panel.shape[3 - axis] for panel in panels)
    parts = []
    for panel in panels:
        panel = panel[np.arange(length) * len(panel) // length]
        missing = [(0, 0)] * 4
        missing[3 - axis] = (0, extent - panel.shape[3 - axis])
        missing[axis] = (0, GAP)
        parts.append(np.pad(panel, missing, constant_values=255))
    joined = np.concatenate(parts, axis)
    return joined[:, :, :-GAP] if axis == 2 else joined[:, :-GAP]


def captioned(panel: Frames, text: str) -> Frames:
    """A clip with a line of text above it, whose middle is left out where it is wider than the clip."""
    if not text:
        return panel
    font = ImageFont.load_default(size=13)
    strip = Image.new('RGB', (panel.shape[2], 18), 'white')
    while len(text) > 1 and font.getlength(text) > strip.width:
        middle = len(text) // 2
        text = text[:middle - 1] + '…' + text[middle + 1:]
    ImageDraw.Draw(strip).text((0, 0), text, 'black', font)
    return np.concatenate([np.broadcast_to(np.asarray(strip), (len(panel), 18, panel.shape[2], 3)), panel], 1)


def panels(explanations: Explanation | Sequence[Explanation], inputs: Tensor, *, layers: Sequence[str] | str = (),
           names: Sequence[str] | None = None, captions: Sequence[str] = (), style: str = 'overlay', cmap: str = 'jet',
           alpha: float = 0.5, relu: bool = True, mean: Sequence[float] | None = None,
           std: Sequence[float] | None = None) -> Frames:
    """Explanations beside the inputs: a row for each explanation (such as of one class) and input, a column for each
    layer; of strips, a row for each layer too. uint8 (T, H, W, 3).

    Args:
        explanations: Of the same inputs.
        inputs: What was explained, one tensor: images or clips.
        layers: Names of maps; 'all'; or none for the fused map.
        names: Of the classes, by index; 'class 7' if None.
        captions: Of the inputs, such as the names of their files; 'input 0' and so on if there are none.
        style: See `visualize_tube`.
        cmap: See `colours`.
        alpha: Of the colours.
        relu: Show only what speaks for the target, so that a map without any stays blue.
        mean: See `to_frames`.
        std: See `to_frames`.
    """
    rows = []
    for label, _, caption, frames, tubes in _tubes(explanations, inputs, layers, names, captions, relu, mean, std):
        first = captioned(frames if style in ('overlay', 'focus') else frames[[0]], caption)
        shown = [captioned(visualize_tube(frames, tube, style=style, cmap=cmap, alpha=alpha),
                           f'{label}  {layer}'.strip()) for layer, tube in tubes.items()]
        beside = [[strip] for strip in shown] if style == 'strip' else [shown]
        rows += [_side_by_side([first, *row]) for row in beside]
    return _side_by_side(rows, axis=1)


def enlarged(inputs: Tensor) -> Tensor:
    """Images or clips whose shorter side is `SIDE` at least."""
    *rest, height, width = inputs.shape[2:]
    factor = -(-SIDE // min(height, width))
    return upsample(inputs.detach().float(), (*rest, height * factor, width * factor))


def _tubes(explanations: Explanation | Sequence[Explanation], inputs: Tensor, layers: Sequence[str] | str = (),
           names: Sequence[str] | None = None, captions: Sequence[str] = (), relu: bool = True,
           mean: Sequence[float] | None = None, std: Sequence[float] | None = None
           ) -> Iterator[tuple[str, int, str, Frames, dict[str, np.ndarray]]]:
    """Of each explanation and input: label, number, caption, frames, and layer -> tube (T, H, W) in 0..1."""
    explanations = [explanations] if isinstance(explanations, Explanation) else list(explanations)
    for explanation in explanations:
        if len(explanation.logits) != len(inputs):
            raise ValueError(f'inputs must be the {len(explanation.logits)} that were explained, got {len(inputs)}')
    captions = captions or ([f'input {item}' for item in range(len(inputs))] if len(inputs) > 1 else ['input'])
    if len(captions) != len(inputs):
        raise ValueError(f'captions must be one for each of the {len(inputs)} inputs, got {len(captions)}')
    inputs = enlarged(inputs)
    size = tuple(inputs.shape[2:])
    clips = to_frames(inputs, mean, std)
    for explanation in explanations:
        chosen = list(explanation.maps) if layers == 'all' else list(layers)
        named: dict[str, str | None] = {layer: layer for layer in chosen} or {'': None}
        tubes = {}
        for name, layer in named.items():
            maps = explanation.upsampled(layer, size=size)
            tubes[name] = normalize(maps.relu() if relu else maps)[:, 0].float().cpu().numpy()
        for item, frames in enumerate(clips):
            target: Any = None if explanation.target is None else explanation.target[item].tolist()
            label = '' if target is None else names[target] if names else f'class {target}'
            yield label, item, captions[item], frames, {name: tube[item].reshape(frames.shape[:3])
                                                        for name, tube in tubes.items()}


def save(explanations: Explanation | Sequence[Explanation], path: str | Path, inputs: Tensor | None = None, *,
         style: str | None = None, fps: float = 8, **options: Any) -> None:
    """Write explanations to ``path``, whose suffix says as what. A file is complete or not there.

    '.npz' holds each layer's maps, logits, targets and, as JSON, ``meta``. All others are pictures and need the
    ``inputs``: '.png' of clips shows strips of frames, '.gif' and '.mp4' move, '.html' is a page with a player that
    needs nothing else.

    Args:
        explanations: One, or several of the same inputs.
        path: The file.
        inputs: What was explained, one tensor: images or clips.
        style: See `visualize_tube`; None for 'strip' where a clip becomes a PNG, 'overlay' elsewhere.
        fps: Frames in a second.
        **options: See `panels`.

    Raises:
        ValueError: If the suffix is another one, inputs are missing, or an option has no such choice.
        TypeError: If ``inputs`` are not one tensor.
        ImportError: If PyAV is missing for '.mp4'.
    """
    path = checked(path)
    if path.suffix == '.npz':
        several = [explanations] if isinstance(explanations, Explanation) else list(explanations)
        arrays: Any = {name if len(several) == 1 else f'{index}/{name}': value
                       for index, explanation in enumerate(several) for name, value in _arrays(explanation).items()}
        with written(path) as file:
            np.savez_compressed(file, **arrays)
        return
    if inputs is None:
        raise ValueError(f'inputs must be given to show an explanation as {path.suffix}, got None')
    check_one_tensor(inputs)
    if path.suffix == '.html':
        from .html import page

        alpha, _ = options.pop('alpha', 0.5), options.pop('cmap', None)  # the page has colours of its own
        check_alpha(alpha)
        data: Any = page(list(_tubes(explanations, inputs, **options)), fps=fps, alpha=alpha).encode()
    else:
        style = style or ('strip' if path.suffix == '.png' and inputs.ndim == 5 else 'overlay')
        data = panels(explanations, inputs, style=style, **options)
    with written(path) as file:
        WRITERS[path.suffix](file, data, fps)


def check_alpha(alpha: float) -> None:
    if not 0 <= alpha <= 1:
        raise ValueError(f'alpha must be in 0..1, got {alpha!r}')


def check_one_tensor(inputs: Any) -> None:
    if not isinstance(inputs, Tensor):
        raise TypeError(f'inputs must be one tensor, of several that which is to be seen, got {type(inputs).__name__}')


def checked(path: str | Path, suffixes: Sequence[str] = ()) -> Path:
    """``path``, if it can be written; ``suffixes`` are those of `save` by default.

    Raises:
        ValueError: If its suffix is another one.
        FileNotFoundError: If its folder is missing.
        PermissionError: If nothing can be written there.
    """
    path, suffixes = Path(path), suffixes or list(WRITERS)
    if path.suffix not in suffixes:
        raise ValueError(f'path must end with {", ".join(suffixes)}, got {str(path)!r}')
    if not path.parent.is_dir():
        raise FileNotFoundError(f'path must be in a folder that exists, got {str(path)!r}')
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f'path must be in a folder that can be written to, got {str(path)!r}')
    return path


def save_gallery(rows: Sequence[Tensor], path: str | Path, captions: Sequence[Sequence[str]] = (), *,
                 fps: float = 8, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> None:
    """Write images or clips side by side to a PNG, of clips the middle frame, or to a GIF or MP4.

    Args:
        rows: Batches (B, C, [T,] H, W) of as many items, one below the other.
        path: The file.
        captions: Of the items of each row.
        fps: Frames in a second.
        mean: See `to_frames`.
        std: See `to_frames`.

    Raises:
        ValueError: If the suffix is another one.
    """
    path = checked(path, MOVING)
    lines: list[Frames] = []
    for row, texts in zip(rows, captions or [[''] * len(row) for row in rows], strict=True):
        clips = to_frames(enlarged(row), mean, std)
        clips = clips[:, [clips.shape[1] // 2]] if path.suffix == '.png' else clips
        lines.append(_side_by_side([captioned(clip, text) for clip, text in zip(clips, texts, strict=True)]))
    with written(path) as file:
        WRITERS[path.suffix](file, _side_by_side(lines, axis=1), fps)


def _arrays(explanation: Explanation) -> dict[str, np.ndarray]:
    arrays = {f'maps/{name}': map_.cpu().numpy() for name, map_ in explanation.maps.items()}
    arrays['logits'] = explanation.logits.float().cpu().numpy()
    if explanation.target is not None:
        arrays['target'] = explanation.target.cpu().numpy()
    arrays['meta'] = np.array(json.dumps({'method': explanation.method, 'input_size': explanation.input_size,
                                          **explanation.meta}, default=str))
    return arrays


def _write_png(file: Any, frames: Frames, fps: float) -> None:
    Image.fromarray(frames[0]).save(file, 'PNG')


def _write_gif(file: Any, frames: Frames, fps: float) -> None:
    first, *rest = (Image.fromarray(frame) for frame in frames)
    first.save(file, 'GIF', save_all=True, append_images=rest, duration=round(1000 / fps), loop=0)


def _write_mp4(file: Any, frames: Frames, fps: float) -> None:
    try:
        import av
    except ImportError as error:
        raise ImportError("MP4 needs PyAV: pip install 'timm-softpool[video]'") from error
    frames = np.pad(frames, [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)], mode='edge')
    with av.open(file, 'w', 'mp4') as container:
        stream = container.add_stream('libx264', rate=round(fps))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], 'yuv420p'
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), 'rgb24')))
        container.mux(stream.encode())


WRITERS: dict[str, Callable[[Any, Any, float], Any]] = {
    '.png': _write_png, '.gif': _write_gif, '.mp4': _write_mp4, '.npz': lambda *_: None,
    '.html': lambda file, data, fps: file.write(data),
}
MOVING = ('.png', '.gif', '.mp4')  # of frames alone
