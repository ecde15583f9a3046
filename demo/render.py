"""Photos of second-hand phones, drawn: any number, any size, the same pixels for the same seed.

A phone is a flat sprite (front or back) laid on a textured plane. A camera at a random height,
tilt and turn looks at both; light, shadow, glare, blur, noise and JPEG do the rest.

    python -m demo.render --out photos --listings 300 --photos 4 --size 1024x768

writes photos/<listing>/<k>.jpg.
"""

import functools
import math
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from pipeline.stage import command
from pipeline.stage.errors import SettingsError

Size = tuple[int, int]
RGB = tuple[int, int, int]
Floats = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float64]

BASE = 1400  # longest side that is composed; larger photos are enlarged from it
SPRITE = 6  # sprite pixels per millimetre
TEXTURE = 3  # texture pixels per millimetre
TEXTURE_SIDE = 1024
THICKNESS = 7.8  # of a phone, mm
FOCAL = 1.6  # focal length as a multiple of the longest side


@dataclass(frozen=True)
class Model:
    """A phone's outside; lengths in millimetres."""

    generation: int
    width: float
    height: float
    radius: float
    camera: str
    front: str
    colours: dict[str, RGB]


MODELS = {
    "SE": Model(
        10, 67.3, 138.4, 9.5, "single", "button",
        {"midnight": (44, 49, 58), "starlight": (240, 232, 220), "red": (178, 24, 40)},
    ),
    "11": Model(
        11, 75.7, 150.9, 11, "dual", "notch",
        {"purple": (205, 196, 222), "yellow": (250, 226, 130), "green": (172, 220, 200),
         "white": (243, 243, 238), "black": (46, 46, 50)},
    ),
    "12 Pro": Model(
        12, 71.5, 146.7, 10, "triple", "notch",
        {"pacific": (56, 84, 102), "gold": (236, 212, 184), "graphite": (86, 84, 80)},
    ),
    "13": Model(
        13, 71.5, 146.7, 10, "diagonal", "notch",
        {"pink": (246, 206, 204), "blue": (46, 98, 142), "midnight": (38, 44, 54),
         "green": (74, 96, 74)},
    ),
    "14 Pro": Model(
        14, 71.5, 147.5, 10.5, "triple", "island",
        {"deep purple": (94, 82, 108), "space black": (62, 60, 58), "silver": (228, 230, 228)},
    ),
    "16": Model(
        16, 71.6, 147.6, 11, "pill", "island",
        {"ultramarine": (140, 154, 232), "teal": (170, 208, 206), "pink": (240, 166, 206),
         "black": (58, 60, 62)},
    ),
}  # fmt: skip

VIEWS = ("back", "front", "angle", "dark", "corner")

# name: (texture, base colour, second colour)
BACKGROUNDS: dict[str, tuple[str, RGB, RGB]] = {
    "oak desk": ("wood", (190, 148, 100), (150, 108, 66)),
    "walnut desk": ("wood", (112, 76, 52), (74, 48, 34)),
    "pine floor": ("wood", (222, 184, 132), (196, 150, 96)),
    "grey laminate": ("wood", (158, 154, 148), (124, 120, 116)),
    "white desk": ("plain", (226, 226, 222), (214, 214, 212)),
    "black desk": ("plain", (52, 50, 50), (44, 42, 44)),
    "blue linen": ("fabric", (92, 118, 156), (66, 88, 124)),
    "white sheet": ("fabric", (228, 224, 216), (200, 196, 190)),
    "rose blanket": ("fabric", (196, 142, 138), (160, 108, 106)),
    "green sofa": ("fabric", (92, 110, 84), (66, 82, 62)),
    "grey tiles": ("tiles", (156, 156, 154), (204, 202, 196)),
    "beige tiles": ("tiles", (214, 198, 172), (168, 152, 132)),
    "terracotta": ("tiles", (178, 106, 74), (206, 196, 184)),
    "grey carpet": ("carpet", (124, 122, 122), (84, 82, 84)),
    "red carpet": ("carpet", (136, 50, 52), (92, 30, 36)),
    "marble": ("marble", (232, 230, 226), (140, 138, 142)),
}

WALLPAPERS: tuple[tuple[RGB, RGB], ...] = (
    ((28, 52, 120), (216, 108, 160)),
    ((12, 90, 110), (120, 220, 190)),
    ((240, 150, 60), (150, 30, 90)),
    ((30, 30, 40), (90, 96, 120)),
    ((120, 180, 240), (240, 240, 250)),
    ((60, 20, 100), (60, 150, 240)),
    ((30, 90, 50), (190, 210, 110)),
    ((200, 60, 60), (250, 190, 160)),
)


@dataclass(frozen=True)
class Listing:
    """What all photos of one listing share."""

    model: str
    colour: str
    background: str
    wallpaper: int

    @property
    def title(self) -> str:
        return f"iPhone {self.model}, {self.colour}"


def draw_listing(seed: int) -> Listing:
    """A listing of a random model, colour and place."""
    draw = np.random.RandomState(seed)
    model = list(MODELS)[draw.randint(len(MODELS))]
    colours = list(MODELS[model].colours)
    return Listing(
        model,
        colours[draw.randint(len(colours))],
        list(BACKGROUNDS)[draw.randint(len(BACKGROUNDS))],
        int(draw.randint(len(WALLPAPERS))),
    )


def render_listing(listing: Listing, photos: int, size: Size, seed: int) -> list[Image.Image]:
    """The first `photos` views of one phone in one place."""
    return [render_view(listing, k, size, seed) for k in range(photos)]


def render_view(listing: Listing, k: int, size: Size, seed: int) -> Image.Image:
    """The listing's k-th photo: back, front, then the other views in turn."""
    return render_photo(
        listing.model,
        listing.colour,
        VIEWS[k % len(VIEWS)],
        listing.background,
        size=size,
        seed=seed * 1009 + k,
        wallpaper=listing.wallpaper,
    )


def render_photo(
    model: str,
    colour: str,
    view: str,
    background: str,
    *,
    size: Size,
    seed: int,
    wallpaper: int = 0,
) -> Image.Image:
    """One photo, RGB, of `size` (width, height); the same arguments give the same pixels."""
    draw = np.random.RandomState(seed % 2**32)
    shrink = min(1.0, BASE / max(size))
    canvas_size = (max(8, round(size[0] * shrink)), max(8, round(size[1] * shrink)))
    camera = _camera(draw, MODELS[model], view, canvas_size)
    photo = camera.look_at_plane(background, draw)
    face = {"back": "back", "angle": "back", "corner": "back"}.get(view, view)
    photo = camera.lay_phone(photo, model, colour, face, wallpaper, draw)
    photo = _light(photo, draw)
    blur = draw.uniform(0.0, 0.9) * max(canvas_size) / 1024
    if blur > 0.25:
        photo = photo.filter(ImageFilter.GaussianBlur(blur))
    if canvas_size != size:
        photo = photo.resize(size, Image.Resampling.BICUBIC)
    return _sensor_noise(photo, draw)


@dataclass(frozen=True)
class _Camera:
    """Projects the plane at a height z (mm) above the table, phone at the origin, into pixels."""

    size: Size
    rotation: Matrix
    distance: float
    target: tuple[float, float]
    turn: float
    phone: Model

    def plane(self, z: float) -> Matrix:
        """The 3x3 homography from millimetres on the plane at height z to pixels."""
        focal = FOCAL * max(self.size)
        intrinsics = np.array(
            [[focal, 0, self.size[0] / 2], [0, focal, self.size[1] / 2], [0, 0, 1]]
        )
        offset = self.rotation @ np.array([-self.target[0], -self.target[1], z])
        offset += np.array([0, 0, self.distance])
        return np.asarray(intrinsics @ np.column_stack([self.rotation[:, :2], offset]))

    def pixels_per_mm(self) -> float:
        return FOCAL * max(self.size) / self.distance

    def look_at_plane(self, background: str, draw: np.random.RandomState) -> Image.Image:
        """The table, turned and shifted at random."""
        level = _level(TEXTURE / self.pixels_per_mm())
        texture = _texture(background, level)
        scale = TEXTURE / 2**level
        spot = draw.uniform(0.42, 0.58, 2) * texture.size
        place = _turned(draw.choice([0, 90, 180, 270]) + draw.uniform(-12, 12)) * [
            [scale], [scale], [1]
        ]  # fmt: skip
        place[:2, 2] = spot
        return _warp(texture, place @ np.linalg.inv(self.plane(0)), self.size)

    def lay_phone(
        self,
        photo: Image.Image,
        model: str,
        colour: str,
        face: str,
        wallpaper: int,
        draw: np.random.RandomState,
    ) -> Image.Image:
        """Shadow, edge, face and glare, in that order."""
        level = _level(SPRITE / self.pixels_per_mm())
        sprite = _sprite(model, colour, face, wallpaper, level)
        photo = self._cast_shadow(photo, _sprite(model, colour, face, wallpaper, 3), draw)
        box = self._phone_box()
        part = photo.crop(box)
        outline = sprite.getchannel("A")
        rim = MODELS[model].colours[colour]
        for z in (1.6, 3.4, 5.2, 7.0):
            edge = tuple(int((c * 0.62 + 26) * (0.55 + 0.07 * z)) for c in rim)
            part.paste(edge, (0, 0), self._on_phone(outline, level, z, box))
        top = self._on_phone(sprite, level, THICKNESS, box)
        mask = top.getchannel("A")
        part.paste(top.convert("RGB"), (0, 0), mask)
        part = _glare(part, mask, draw, strength=0.5 if face == "dark" else 0.16)
        photo.paste(part, box[:2])
        return photo

    def _phone_box(self) -> tuple[int, int, int, int]:
        """The pixels (left, top, right, bottom) that the phone can touch."""
        x, y = self.phone.width / 2, self.phone.height / 2
        corners = np.array([[-x, x, x, -x], [-y, -y, y, y], [1, 1, 1, 1]])
        lying = _turned(self.turn) @ corners
        seen = np.concatenate([self.plane(z) @ lying for z in (0, THICKNESS)], axis=1)
        seen = seen[:2] / seen[2]
        low = np.clip(np.floor(seen.min(axis=1)) - 2, 0, self.size).astype(int)
        high = np.clip(np.ceil(seen.max(axis=1)) + 2, low + 1, self.size).astype(int)
        return int(low[0]), int(low[1]), int(high[0]), int(high[1])

    def _on_phone(
        self,
        sprite: Image.Image,
        level: int,
        z: float,
        box: tuple[int, int, int, int],
        shrink: float = 1,
    ) -> Image.Image:
        """The part `box` of what the camera sees of a sprite at height z, made smaller."""
        scale = SPRITE / 2**level
        place = _turned(-self.turn) * [[scale], [scale], [1]]
        place[0, 2], place[1, 2] = sprite.size[0] / 2, sprite.size[1] / 2
        canvas = np.diag([1 / shrink, 1 / shrink, 1]) @ _shifted(-box[0], -box[1])
        size = (round((box[2] - box[0]) / shrink), round((box[3] - box[1]) / shrink))
        return _warp(sprite, place @ np.linalg.inv(canvas @ self.plane(z)), size)

    def _cast_shadow(
        self, photo: Image.Image, sprite: Image.Image, draw: np.random.RandomState
    ) -> Image.Image:
        shrink = max(1.0, max(self.size) / 160)
        whole = (0, 0, *self.size)
        outline = self._on_phone(sprite.getchannel("A"), 3, 0, whole, shrink)
        mm = self.pixels_per_mm() / shrink
        angle, length = draw.uniform(0, 2 * math.pi), draw.uniform(2, 8) * mm
        far = ImageChops.offset(
            outline, round(math.cos(angle) * length), round(math.sin(angle) * length)
        )
        far = far.filter(ImageFilter.GaussianBlur(5 * mm)).point(lambda v: v * 0.55)
        near = outline.filter(ImageFilter.GaussianBlur(1.6 * mm)).point(lambda v: v * 0.5)
        shadow = ImageChops.lighter(far, near).resize(self.size, Image.Resampling.BILINEAR)
        photo.paste((8, 8, 12), (0, 0), shadow)
        return photo


def _camera(draw: np.random.RandomState, phone: Model, view: str, size: Size) -> _Camera:
    """How a seller holds the camera: nearly from above, tilted for an angle, close for a corner."""
    tilt = draw.uniform(26, 42) if view == "angle" else draw.uniform(0, 16)
    around = draw.uniform(0, 2 * math.pi)
    if view == "angle":
        around = draw.choice([-1, 1]) * draw.uniform(0.1, 0.6)
    turn = draw.normal(0, 9) + (90 if size[0] > size[1] else 0) + 180 * (draw.rand() < 0.08)
    fill = draw.uniform(0.72, 0.92) * (1.0 if max(size) > 1.2 * min(size) else 0.9)
    target = draw.uniform(-7, 7, 2)
    if view == "corner":
        fill *= 2.1
        corner = np.array([-phone.width * 0.22, -phone.height * 0.3])
        target = target * 0.5 + _turned(turn)[:2, :2] @ corner
    return _Camera(
        size=size,
        rotation=_tilted(tilt, around),
        distance=FOCAL * phone.height / fill,
        target=(float(target[0]), float(target[1])),
        turn=turn,
        phone=phone,
    )


def _tilted(degrees: float, around: float) -> Matrix:
    """World to camera: depth grows away from the camera, height (z) towards it."""
    t, axis = math.radians(degrees), np.array([math.cos(around), math.sin(around), 0])
    cross = np.cross(np.eye(3), axis)
    rotation = np.eye(3) + math.sin(t) * cross + (1 - math.cos(t)) * cross @ cross
    return np.asarray(rotation @ np.diag([1.0, 1.0, -1.0]))


def _shifted(x: float, y: float) -> Matrix:
    return np.array([[1, 0, x], [0, 1, y], [0, 0, 1.0]])


def _turned(degrees: float) -> Matrix:
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def _warp(image: Image.Image, to_source: Matrix, size: Size) -> Image.Image:
    """Resample `image` where the homography sends each pixel of a canvas of `size`."""
    m = (to_source / to_source[2, 2]).ravel()[:8].tolist()
    return image.transform(size, Image.Transform.PERSPECTIVE, m, Image.Resampling.BILINEAR)


def _level(minification: float) -> int:
    """How often to halve a source image before it is sampled, so that nothing shimmers."""
    return max(0, min(3, math.floor(math.log2(max(1.0, minification)) + 0.6)))


def _light(photo: Image.Image, draw: np.random.RandomState) -> Image.Image:
    """A lamp or window to one side, its colour, exposure, and the lens's dark corners."""
    y, x = np.mgrid[-1:1:24j, -1:1:24j]
    angle = draw.uniform(0, 2 * math.pi)
    ramp = 1 + draw.uniform(0.08, 0.3) * (x * math.cos(angle) + y * math.sin(angle))
    corners = 1 - draw.uniform(0.04, 0.14) * (x * x + y * y)
    warmth = draw.normal(0, 0.035)
    tint = np.array([1 + warmth, 1 + draw.normal(0, 0.008), 1 - warmth])
    gain = (ramp * corners * draw.uniform(0.82, 1.08))[..., None] * tint
    # 255 stands for a gain of 1.5; the photo is brightened by as much afterwards
    coarse = Image.fromarray(np.clip(gain / 1.5 * 255, 0, 255).astype(np.uint8))
    gains = coarse.resize(photo.size, Image.Resampling.BICUBIC)
    return ImageChops.multiply(photo, gains).point(
        [min(255, round(v * 1.5)) for v in range(256)] * 3
    )


def _glare(
    photo: Image.Image, mask: Image.Image, draw: np.random.RandomState, strength: float
) -> Image.Image:
    """A window's soft reflection across the glass."""
    y, x = np.mgrid[-1:1:48j, -1:1:48j]
    angle, shift = draw.uniform(0, math.pi), draw.uniform(-0.4, 0.4)
    across = x * math.cos(angle) + y * math.sin(angle) + shift
    width = draw.uniform(0.12, 0.4)
    band = 1 / (1 + np.exp((np.abs(across) - width) * 18))
    glow = (0.25 + 0.75 * band) * draw.uniform(0.4, 1.0) * strength * 255
    soft = Image.fromarray(glow.astype(np.uint8)).resize(photo.size, Image.Resampling.BICUBIC)
    photo.paste((236, 242, 250), (0, 0), ImageChops.multiply(soft, mask))
    return photo


@functools.lru_cache(maxsize=1)
def _grain() -> npt.NDArray[np.int16]:
    noise = np.random.RandomState(1).normal(0, 32, (1024, 1024)).astype(np.float32)
    blotches = _noise(np.random.RandomState(2), (1024, 1024), 512, 512) * 24
    return np.asarray(noise + blotches, np.int16)


def _sensor_noise(photo: Image.Image, draw: np.random.RandomState) -> Image.Image:
    """Grain of a random strength, the same in all channels plus a little colour."""
    shift = int(np.log2(32 / draw.uniform(1.5, 6)) + 0.5)
    grain = _grain() >> shift
    pixels = np.array(photo)
    oy, ox = draw.randint(0, 1024, 2)
    grain = np.roll(grain, (oy, ox), (0, 1))
    for top in range(0, pixels.shape[0], 1024):
        for left in range(0, pixels.shape[1], 1024):
            block = pixels[top : top + 1024, left : left + 1024]
            noise = grain[: block.shape[0], : block.shape[1], None]
            block[:] = np.clip(block + noise, 0, 255)
    return Image.fromarray(pixels)


# Sprites


@functools.lru_cache(maxsize=160)
def _sprite(model: str, colour: str, face: str, wallpaper: int, level: int) -> Image.Image:
    """A phone's face as RGBA, SPRITE pixels per mm, halved `level` times."""
    if level:
        return _sprite(model, colour, face, wallpaper, 0).reduce(2**level)
    phone, rgb = MODELS[model], MODELS[model].colours[colour]
    pen = _Pen(phone.width, phone.height, rgb)
    frame = _mix(rgb, (128, 128, 132), 0.35)
    pen.box(0, 0, phone.width, phone.height, phone.radius, _mix(frame, (255, 255, 255), 0.25))
    pen.box(0.5, 0.5, phone.width - 0.5, phone.height - 0.5, phone.radius - 0.4, frame)
    if face == "back":
        _draw_back(pen, phone, rgb)
    else:
        _draw_front(pen, phone, wallpaper if face == "front" else None)
    return pen.finish(phone.radius)


class _Pen:
    """Draws in millimetres at twice the sprite's resolution."""

    SCALE = 2 * SPRITE

    def __init__(self, width: float, height: float, fill: RGB) -> None:
        self.image = Image.new("RGB", (round(width * self.SCALE), round(height * self.SCALE)), fill)
        self.draw = ImageDraw.Draw(self.image)

    def box(self, x0: float, y0: float, x1: float, y1: float, radius: float, fill: RGB) -> None:
        corners = [round(v * self.SCALE) for v in (x0, y0, x1, y1)]
        self.draw.rounded_rectangle(corners, round(radius * self.SCALE), fill=fill)

    def disc(self, x: float, y: float, radius: float, fill: RGB) -> None:
        s = self.SCALE
        self.draw.ellipse(
            [(x - radius) * s, (y - radius) * s, (x + radius) * s, (y + radius) * s], fill
        )

    def shade(
        self, x0: float, y0: float, x1: float, y1: float, radius: float, pixels: Image.Image
    ) -> None:
        """Paste `pixels`, stretched, into a rounded box."""
        box = [round(v * self.SCALE) for v in (x0, y0, x1, y1)]
        size = (box[2] - box[0], box[3] - box[1])
        mask = Image.new("L", size, 0)
        ImageDraw.Draw(mask).rounded_rectangle(
            (0, 0, size[0] - 1, size[1] - 1), round(radius * self.SCALE), fill=255
        )
        self.image.paste(pixels.resize(size, Image.Resampling.BICUBIC), (box[0], box[1]), mask)

    def finish(self, radius: float) -> Image.Image:
        mask = Image.new("L", self.image.size, 0)
        w, h = self.image.size
        ImageDraw.Draw(mask).rounded_rectangle((0, 0, w - 1, h - 1), radius * self.SCALE, fill=255)
        self.image.putalpha(mask)
        return self.image.reduce(2)


def _mix(a: RGB, b: RGB, share: float) -> RGB:
    """`share` of b in a."""
    r, g, bl = (round(x * (1 - share) + y * share) for x, y in zip(a, b, strict=True))
    return r, g, bl


def _gradient(a: RGB, b: RGB, angle: float = 1.1) -> Image.Image:
    """A small image that runs from a to b; it is stretched where it is used."""
    y, x = np.mgrid[0:1:32j, 0:1:32j]
    t = x * math.cos(angle) + y * math.sin(angle)
    t = ((t - t.min()) / (t.max() - t.min()))[..., None]
    return Image.fromarray((np.array(a) * (1 - t) + np.array(b) * t).astype(np.uint8))


def _draw_back(pen: _Pen, phone: Model, rgb: RGB) -> None:
    w, h = phone.width, phone.height
    light, dark = _mix(rgb, (255, 255, 255), 0.14), _mix(rgb, (0, 0, 0), 0.16)
    pen.shade(1.1, 1.1, w - 1.1, h - 1.1, phone.radius - 1, _gradient(light, dark))
    mark = _mix(rgb, (255, 255, 255) if sum(rgb) < 380 else (90, 90, 96), 0.3)
    pen.disc(w / 2, h * 0.46, 6.2, mark)
    pen.disc(w / 2, h * 0.46, 4.4, _mix(mark, rgb, 0.55))
    pen.disc(w / 2 + 3.1, h * 0.46 - 3.1, 2.0, rgb)
    _CAMERAS[phone.camera](pen, phone, rgb)


def _lens(pen: _Pen, x: float, y: float, radius: float, ring: RGB) -> None:
    """Metal ring, black barrel, coated glass, highlight."""
    pen.disc(x, y, radius * 1.12, _mix(ring, (0, 0, 0), 0.35))
    pen.disc(x, y, radius * 1.04, _mix(ring, (255, 255, 255), 0.35))
    for share, fill in (
        (0.92, (14, 14, 16)), (0.7, (34, 35, 40)), (0.62, (10, 10, 14)),
        (0.42, (26, 34, 66)), (0.28, (8, 8, 18)),
    ):  # fmt: skip
        pen.disc(x, y, radius * share, fill)
    pen.disc(x - radius * 0.2, y - radius * 0.24, radius * 0.15, (150, 170, 220))
    pen.disc(x + radius * 0.2, y + radius * 0.22, radius * 0.08, (110, 90, 150))


def _flash(pen: _Pen, x: float, y: float, radius: float = 2.2) -> None:
    pen.disc(x, y, radius * 1.15, (170, 168, 160))
    pen.disc(x, y, radius, (250, 244, 222))
    pen.disc(x, y, radius * 0.5, (255, 230, 160))


def _island(pen: _Pen, x1: float, y1: float, radius: float, rgb: RGB) -> None:
    """The raised glass around the lenses, with its shadow and its light edge."""
    tone = _mix(rgb, (255, 255, 255), 0.16) if sum(rgb) < 560 else _mix(rgb, (120, 120, 124), 0.14)
    pen.box(3.4, 3.6, x1 + 0.9, y1 + 1.1, radius, _mix(rgb, (0, 0, 0), 0.34))
    pen.box(3.2, 3.2, x1 + 0.3, y1 + 0.3, radius, _mix(tone, (255, 255, 255), 0.4))
    pen.shade(3.6, 3.6, x1, y1, radius - 0.4, _gradient(tone, _mix(tone, (0, 0, 0), 0.1)))


def _camera_single(pen: _Pen, phone: Model, rgb: RGB) -> None:
    _lens(pen, 11, 11, 4.6, _mix(rgb, (200, 200, 204), 0.6))
    _flash(pen, 20.5, 11)


def _camera_dual(pen: _Pen, phone: Model, rgb: RGB) -> None:
    _island(pen, 34.5, 34.5, 8.5, rgb)
    _lens(pen, 12.6, 12.6, 5.6, rgb)
    _lens(pen, 12.6, 26.2, 5.6, rgb)
    _flash(pen, 26.6, 12.8, 2.8)
    pen.disc(26.6, 26.2, 0.9, (30, 30, 32))


def _camera_diagonal(pen: _Pen, phone: Model, rgb: RGB) -> None:
    _island(pen, 33.5, 33.5, 8.2, rgb)
    _lens(pen, 12.4, 12.2, 6.0, rgb)
    _lens(pen, 25.2, 25.2, 6.0, rgb)
    _flash(pen, 25.8, 11.4, 2.4)
    pen.disc(11.6, 26, 0.9, (30, 30, 32))


def _camera_triple(pen: _Pen, phone: Model, rgb: RGB) -> None:
    _island(pen, 39.5, 39.5, 9.5, rgb)
    ring = _mix(rgb, (190, 190, 196), 0.5)
    _lens(pen, 13.4, 13.4, 7.2, ring)
    _lens(pen, 13.4, 30, 7.2, ring)
    _lens(pen, 30, 21.6, 7.2, ring)
    _flash(pen, 30.4, 9.2, 2.6)
    pen.disc(30.4, 34.2, 1.9, (26, 24, 28))


def _camera_pill(pen: _Pen, phone: Model, rgb: RGB) -> None:
    _island(pen, 22.4, 42, 9.4, rgb)
    _lens(pen, 12.9, 13.2, 6.9, rgb)
    _lens(pen, 12.9, 31.6, 6.9, rgb)
    _flash(pen, 28.4, 12.6, 2.5)


_CAMERAS: dict[str, Callable[[_Pen, Model, RGB], None]] = {
    "single": _camera_single,
    "dual": _camera_dual,
    "diagonal": _camera_diagonal,
    "triple": _camera_triple,
    "pill": _camera_pill,
}


def _draw_front(pen: _Pen, phone: Model, wallpaper: int | None) -> None:
    """Black glass; without a wallpaper the screen is off."""
    w, h = phone.width, phone.height
    button = phone.front == "button"
    pen.box(1.0, 1.0, w - 1.0, h - 1.0, phone.radius - 0.9, (12, 12, 14))
    side, top = (4.2, 17.0) if button else (3.6, 3.6)
    corner = 0.6 if button else phone.radius - 3.0
    if wallpaper is None:
        pen.shade(side, top, w - side, h - top, corner, _gradient((24, 25, 29), (14, 15, 18), 0.7))
    else:
        _draw_home_screen(pen, wallpaper, (side, top, w - side, h - top), corner)
    if button:
        pen.disc(w / 2, h - 9, 5.6, (72, 72, 76))
        pen.disc(w / 2, h - 9, 5.0, (16, 16, 18))
        pen.box(w / 2 - 4, 8, w / 2 + 4, 9.2, 0.6, (44, 44, 48))
    elif phone.front == "notch":
        pen.box(w / 2 - 16, 1.2, w / 2 + 16, 8.8, 3.2, (12, 12, 14))
        pen.box(w / 2 - 4, 4.2, w / 2 + 4, 5.2, 0.5, (46, 46, 50))
        pen.disc(w / 2 + 9, 5.2, 1.5, (30, 34, 52))
    else:
        pen.box(w / 2 - 10, 6, w / 2 + 10, 11.6, 2.8, (6, 6, 8))
        pen.disc(w / 2 + 6.6, 8.8, 1.4, (26, 30, 48))


_ICONS: tuple[RGB, ...] = (
    (76, 217, 100), (0, 122, 255), (255, 149, 0), (255, 59, 48), (240, 240, 244), (88, 86, 214),
    (52, 52, 56), (255, 204, 0), (90, 200, 250), (255, 45, 85),
)  # fmt: skip


def _draw_home_screen(
    pen: _Pen, wallpaper: int, box: tuple[float, float, float, float], corner: float
) -> None:
    """Wallpaper, clock, four columns of icons, dock."""
    x0, y0, x1, y1 = box
    first, second = WALLPAPERS[wallpaper % len(WALLPAPERS)]
    pen.shade(*box, corner, _wallpaper(first, second, wallpaper))
    draw = np.random.RandomState(wallpaper)
    pitch = (x1 - x0 - 5) / 4
    icon = pitch * 0.72
    pen.box(x0 + 5, y0 + 2.2, x0 + 12, y0 + 4, 0.8, (250, 250, 250))
    pen.box(x1 - 11, y0 + 2.2, x1 - 5, y0 + 4, 0.8, (250, 250, 250))
    top = y0 + 12
    rows = int((y1 - top - pitch * 1.7) / (pitch * 1.22))
    for row in range(rows):
        for column in range(4 if row < rows - 1 else draw.randint(1, 5)):
            x = x0 + 2.5 + pitch * column + (pitch - icon) / 2
            y = top + row * pitch * 1.22
            _draw_icon(pen, x, y, icon, draw)
            pen.box(x + 2, y + icon + 1.1, x + icon - 2, y + icon + 2, 0.4, (235, 235, 240))
    dock = y1 - pitch * 1.22
    pen.box(x0 + 2, dock, x1 - 2, y1 - 2, max(1.5, corner - 2), _mix(second, (240, 240, 245), 0.5))
    for column in range(4):
        x = x0 + 2.5 + pitch * column + (pitch - icon) / 2
        _draw_icon(pen, x, dock + (y1 - 2 - dock - icon) / 2, icon, draw)


def _draw_icon(pen: _Pen, x: float, y: float, side: float, draw: np.random.RandomState) -> None:
    fill = _ICONS[draw.randint(len(_ICONS))]
    ink = (255, 255, 255) if sum(fill) < 640 else _ICONS[draw.randint(3)]
    pen.shade(
        x, y, x + side, y + side, side * 0.24,
        _gradient(_mix(fill, (255, 255, 255), 0.2), _mix(fill, (0, 0, 0), 0.12), 1.57),
    )  # fmt: skip
    cx, cy, shape = x + side / 2, y + side / 2, draw.randint(3)
    if shape == 0:
        pen.disc(cx, cy, side * 0.27, ink)
        pen.disc(cx, cy, side * 0.15, fill)
    elif shape == 1:
        pen.box(
            cx - side * 0.27, cy - side * 0.2, cx + side * 0.27, cy + side * 0.2, side * 0.1, ink
        )
    else:
        for k in (-1, 0, 1):
            pen.box(cx - side * 0.27, cy + side * (0.2 * k - 0.05), cx + side * 0.27,
                    cy + side * (0.2 * k + 0.05), side * 0.04, ink)  # fmt: skip


def _wallpaper(first: RGB, second: RGB, seed: int) -> Image.Image:
    """Flowing bands between two colours."""
    y, x = np.mgrid[0:1:256j, 0:1:128j]
    flow = _noise(np.random.RandomState(seed + 50), (256, 128), 3, 2)
    t = np.clip(0.5 + 0.5 * np.sin(3.2 * (y + 0.5 * x) + 2.4 * flow), 0, 1)[..., None]
    return Image.fromarray((np.array(first) * (1 - t) + np.array(second) * t).astype(np.uint8))


# Surfaces


def _noise(draw: np.random.RandomState, shape: tuple[int, int], rows: int, columns: int) -> Floats:
    """Smooth noise about 0 with a spread of 1: a random grid of rows x columns, enlarged."""
    grid = draw.normal(0, 1, (rows + 1, columns + 1)).astype(np.float32)
    image = Image.fromarray(grid).resize((shape[1], shape[0]), Image.Resampling.BICUBIC)
    return np.asarray(image, np.float32)


@functools.lru_cache(maxsize=64)
def _texture(background: str, level: int) -> Image.Image:
    """A surface of TEXTURE_SIDE pixels mirrored to twice that, so that it has no seam."""
    if level:
        return _full_texture(background).reduce(2**level)
    return _full_texture(background)


@functools.lru_cache(maxsize=6)
def _full_texture(background: str) -> Image.Image:
    kind, first, second = BACKGROUNDS[background]
    draw = np.random.RandomState(list(BACKGROUNDS).index(background))
    share = _SURFACES[kind](draw, TEXTURE_SIDE)[..., None]
    pixels = np.array(first, np.float32) * (1 - share) + np.array(second, np.float32) * share
    tile = np.clip(pixels, 0, 255).astype(np.uint8)
    tile = np.concatenate([tile, tile[::-1]])
    return Image.fromarray(np.concatenate([tile, tile[:, ::-1]], axis=1))


def _wood(draw: np.random.RandomState, n: int) -> Floats:
    """Planks along x: rings as a warped sine, fine fibres, a tone for each plank, dark joints."""
    y = np.linspace(0, 1, n, dtype=np.float32)[:, None]
    warp = _noise(draw, (n, n), 10, 3)
    rings = 0.5 + 0.5 * np.sin(2 * np.pi * (y * 26 + 1.3 * warp))
    fibres = _noise(draw, (n, n), 512, 12)
    planks = 4
    tone = np.repeat(draw.normal(0, 0.22, planks), n // planks)[:, None]
    share = 0.4 * rings + 0.12 * fibres + 0.12 * warp + tone + 0.25
    edge = np.abs((np.arange(n) % (n // planks)) - 2) < 2
    share[edge] = 2.1
    return np.asarray(share, np.float32)


def _plain(draw: np.random.RandomState, n: int) -> Floats:
    return 0.5 + 0.35 * _noise(draw, (n, n), 4, 4) + 0.25 * _noise(draw, (n, n), 600, 600)


def _fabric(draw: np.random.RandomState, n: int) -> Floats:
    """A weave, uneven threads, and soft folds."""
    i = np.arange(n, dtype=np.float32)
    weave = np.sin(i[:, None] * 1.05) * np.sin(i * 1.05)
    threads = _noise(draw, (n, n), n // 3, 24) + _noise(draw, (n, n), 24, n // 3)
    folds = _noise(draw, (n, n), 5, 3)
    creases = np.exp(-np.abs(_noise(draw, (n, n), 4, 3)) * 9)
    return np.asarray(
        0.35 + 0.22 * weave + 0.13 * threads + 0.42 * folds + 0.5 * creases, np.float32
    )


def _tiles(draw: np.random.RandomState, n: int) -> Floats:
    """Square tiles with a tone each, clouds in the glaze, pale or dark joints."""
    per_side = 4
    pitch = n // per_side
    tone = np.kron(draw.normal(0, 0.07, (per_side, per_side)), np.ones((pitch, pitch)))
    clouds = 0.12 * _noise(draw, (n, n), 12, 12) + 0.06 * _noise(draw, (n, n), 200, 200)
    share = tone + clouds
    along = np.arange(n) % pitch
    joint = (along < 5) | (along >= pitch - 5)
    lines = joint[:, None] | joint
    return np.asarray(np.where(lines, 1 + clouds, share), np.float32)


def _carpet(draw: np.random.RandomState, n: int) -> Floats:
    """Tufts and their shadows."""
    tufts = _noise(draw, (n, n), n // 4, n // 4) + 0.6 * _noise(draw, (n, n), n // 2, n // 2)
    return np.asarray(0.5 + 0.42 * tufts + 0.2 * _noise(draw, (n, n), 6, 6), np.float32)


def _marble(draw: np.random.RandomState, n: int) -> Floats:
    """Thin veins where warped noise crosses zero."""
    veins = np.zeros((n, n), np.float32)
    for cells, depth in ((3, 0.8), (6, 0.45), (14, 0.22)):
        field = _noise(draw, (n, n), cells, cells) + 0.25 * _noise(draw, (n, n), 30, 30)
        veins += depth * np.exp(-np.abs(field) * 16)
    return np.asarray(0.1 * _noise(draw, (n, n), 5, 5) + veins, np.float32)


_SURFACES: dict[str, Callable[[np.random.RandomState, int], Floats]] = {
    "wood": _wood,
    "plain": _plain,
    "fabric": _fabric,
    "tiles": _tiles,
    "carpet": _carpet,
    "marble": _marble,
}


# Pictures that are no photos


def render_stock(model: str, colour: str, *, size: Size) -> Image.Image:
    """The maker's picture: front and back on white, the same for every listing that uses it."""
    canvas = _gradient((255, 255, 255), (232, 234, 238), 1.57).resize(
        size, Image.Resampling.BICUBIC
    )
    height = round(min(size[1] * 0.82, size[0] * 1.15))
    for face, shift in (("back", -0.2), ("front", 0.2)):
        sprite = _sprite(model, colour, face, 0, 0)
        width = round(height * sprite.size[0] / sprite.size[1])
        sprite = sprite.resize((width, height), Image.Resampling.LANCZOS)
        left = round(size[0] / 2 + shift * 1.75 * width - width / 2)
        canvas.paste(sprite.convert("RGB"), (left, (size[1] - height) // 2), sprite.getchannel("A"))
    return canvas


def render_screenshot(*, size: Size, seed: int) -> Image.Image:
    """The battery health page of the phone's settings, light or dark, 76 to 100 per cent."""
    draw = np.random.RandomState(seed % 2**32)
    dark, health = draw.rand() < 0.3, draw.randint(76, 101)
    page, card, ink, grey = (
        ((0, 0, 0), (28, 28, 30), (255, 255, 255), (152, 152, 158))
        if dark
        else ((242, 242, 247), (255, 255, 255), (0, 0, 0), (128, 128, 134))
    )
    width, height = 390, 844
    image = Image.new("RGB", (width, height), page)
    pen = ImageDraw.Draw(image)
    write = functools.partial(_write, pen)
    write((36, 20), f"{draw.randint(0, 24)}:{draw.randint(0, 60):02d}", 16, ink)
    pen.rounded_rectangle((330, 20, 356, 33), 4, outline=ink, width=2)
    pen.rectangle((333, 23, 333 + draw.randint(6, 20), 30), fill=ink)
    write((16, 62), "< Battery", 16, (0, 122, 255))
    write((width / 2, 62), "Battery Health", 17, ink, "ma")
    write((20, 112), "Phone batteries, like all rechargeable", 13, grey)
    write((20, 130), "batteries, become less effective as they age.", 13, grey)
    rows = (
        (166, "Maximum Capacity", f"{health} %"),
        (272, "Peak Performance", "normal" if health > 79 else "service"),
        (378, "Cycle Count", str(int((100 - health) * 38 + draw.randint(5, 60)))),
    )
    for top, label, value in rows:
        pen.rounded_rectangle((16, top, width - 16, top + 52), 11, fill=card)
        write((32, top + 16), label, 17, ink)
        write((width - 32, top + 16), value, 17, grey, "ra")
        write((32, top + 64), "This is a measure of the battery relative", 12, grey)
        write((32, top + 80), "to when it was new.", 12, grey)
    pen.rounded_rectangle((16, 500, width - 16, 552), 11, fill=card)
    write((32, 516), "Optimised Charging", 17, ink)
    pen.rounded_rectangle((width - 82, 511, width - 32, 541), 15, fill=(52, 199, 89))
    pen.ellipse((width - 60, 513, width - 34, 539), fill=(255, 255, 255))
    pen.rounded_rectangle((width / 2 - 68, height - 14, width / 2 + 68, height - 9), 3, fill=ink)
    return _fit(image, size, page)


def _write(
    pen: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    height: int,
    fill: RGB,
    anchor: str = "la",
) -> None:
    pen.text(at, text, fill=fill, font=ImageFont.load_default(height), anchor=anchor)


def _fit(image: Image.Image, size: Size, fill: RGB) -> Image.Image:
    """The whole image in the middle of a canvas."""
    scale = min(size[0] / image.size[0], size[1] / image.size[1])
    inner = (max(1, round(image.size[0] * scale)), max(1, round(image.size[1] * scale)))
    canvas = Image.new("RGB", size, fill)
    place = ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2)
    canvas.paste(image.resize(inner, Image.Resampling.LANCZOS), place)
    return canvas


# Files


@dataclass(frozen=True)
class Job:
    """A file to be made: `draw()` gives the picture; it must survive pickling.

    With `keep_bytes` the file ends after so many, as when an upload was cut off.
    """

    path: Path
    draw: Callable[[], Image.Image]
    quality: int = 88
    keep_bytes: int | None = None


def write(job: Job) -> None:
    """Draw one picture and write it as a JPEG, whole or not at all."""
    job.path.parent.mkdir(parents=True, exist_ok=True)
    temporary = job.path.with_name(f".{job.path.name}.tmp")
    job.draw().save(temporary, "JPEG", quality=job.quality, subsampling="4:2:0")
    if job.keep_bytes is not None:
        os.truncate(temporary, job.keep_bytes)
    os.replace(temporary, job.path)


def write_all(jobs: Sequence[Job], workers: int) -> None:
    """Draw many pictures in `workers` processes; neighbours in the list share a texture."""
    progress = command.Progress(len(jobs), "photos")
    # Spawned, not forked: the caller may have threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, max(1, len(jobs))), mp_context=context) as pool:
        chunk = max(1, min(16, len(jobs) // (16 * workers)))
        for done, _ in enumerate(pool.map(write, jobs, chunksize=chunk), start=1):
            progress.update(done)


def photo_jobs(
    out: Path, listings: int, photos: int, size: Size, seed: int, quality: int
) -> list[Job]:
    """The photos out/<listing>/<k>.jpg of random listings, for write_all."""
    jobs = []
    for number in range(listings):
        listing_seed = seed * 1_000_003 + number
        listing = draw_listing(listing_seed)
        for k in range(photos):
            path = out / f"{number:06d}" / f"{k}.jpg"
            draw = functools.partial(render_view, listing, k, size, listing_seed)
            jobs.append(Job(path, draw, quality))
    return jobs


def parse_size(text: str) -> Size:
    """'1024x768' as (1024, 768)."""
    try:
        width, height = (int(part) for part in text.lower().split("x"))
    except ValueError:
        width = height = 0
    if min(width, height) < 8:
        raise SettingsError("a size such as 1024x768, at least 8x8", repr(text), "--size")
    return width, height


def main() -> None:
    parser = command.parser(__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the photos")
    parser.add_argument("--listings", type=int, default=300, help="how many listings")
    parser.add_argument("--photos", type=int, default=4, help="photos of each listing")
    parser.add_argument("--size", default="768x1024", help="pixels, width x height")
    parser.add_argument("--seed", type=int, default=0, help="other seeds, other photos")
    parser.add_argument("--quality", type=int, default=88, help="JPEG quality")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes")
    flags = parser.parse_args()
    size = parse_size(flags.size)
    jobs = photo_jobs(flags.out, flags.listings, flags.photos, size, flags.seed, flags.quality)
    write_all(jobs, flags.workers)


if __name__ == "__main__":
    command.run(main, "render")
