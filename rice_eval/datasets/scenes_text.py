"""Text of ``scenes``: what signs say, and plates with text on them, from glyph sheets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rice_eval.datasets.scenes_pack import Font, halve, pack
from rice_eval.datasets.scenes_raster import COLOURS, Draws

__all__ = ["PLATE_COLOURS", "Plate", "SignText", "draw_sign_text", "line", "plate"]

Bytes = NDArray[np.uint8]

# Everyday words of two to seven letters; no word is in both splits.
_LISTS = {
    "train": (
        "ALARM APPLE ARENA BAKERY BANK BEACH BLUE BOOK BREAD BRIDGE BUS CAFE CAMP CHEESE CINEMA CLOSED COFFEE CORNER"
        " DAILY DANGER DEPOT DINER DOCK DOOR EAST EXIT FARM FERRY FIELD FIRE FISH FLOWER FOREST FRESH GARAGE GARDEN"
        " GATE GLASS GOLD GREEN HALL HARBOR HOME HOTEL HOUSE ICE ISLAND JUICE KEEP KITCHEN LAKE LEFT LIBRARY LIGHT"
        " LUNCH MAIN MARKET METRO MILK MUSEUM MUSIC NORTH OFFICE ONE OPEN ORANGE PAPER PARK PHONE PIANO PIZZA PLAZA"
        " POLICE PORT PUMP QUICK QUIET RADIO RED RIVER ROAD ROOM SALE SCHOOL SHOE SHOP SILVER SLOW SOUP SOUTH SPEED"
        " STATION STEEL STOP STORE STREET SUGAR SUMMER TAXI TEA TICKET TIMBER TOOLS TOWER TOWN TRACK TRAIN TUNNEL"
        " VALLEY VIDEO VILLAGE WATER WEST WINDOW WINTER WOOD YARD YELLOW ZONE ZOO"
    ),
    "val": (
        "AIRPORT AVENUE BAY BIKE BLACK BOAT CASTLE CENTER CHURCH CITY CLINIC COAST CREAM DESK DRIVE EGGS ENGINE ENTRY"
        " FACTORY FINISH FLOOR FRUIT GAMES GRAND GRILL HILL HONEY JAZZ KIOSK LANE LEVEL LION MAPLE MEADOW MOTOR NIGHT"
        " OCEAN OVEN PALACE PEPPER PLANET POOL PUBLIC QUEEN RANCH RIGHT ROCKET SALT SHIP SNOW SQUARE STAGE STONE SUNDAY"
        " TABLE TEMPLE THEATER TRUCK UNION VELVET WAGON WHARF WHITE YACHT"
    ),
}

_WORDS = {split: words.split() for split, words in _LISTS.items()}

PLATE_COLOURS: dict[str, tuple[int, int, int]] = {**COLOURS, "white": (240, 240, 236), "black": (28, 28, 32)}


@dataclass(frozen=True)
class SignText:
    """What a sign says and how: transcript, glyph sheet, plate colour by name, corner radius in 1/16 of the height."""

    text: str
    font: Font
    colour: str
    rounding: int


@dataclass(frozen=True)
class Plate:
    """A sign's texture ``(h, w, 4)`` with straight opacity as a pyramid, and the ink box of its text in level-0 pixels."""

    levels: tuple[Bytes, ...]
    ink: tuple[int, int, int, int]


def draw_sign_text(draws: Draws, split: str, colours: tuple[str, ...]) -> SignText:
    """A word (three in five; capitals, capitalised or small) or a number of two to four digits, in a font of the split."""
    if draws.below(5) < 3:
        word = _WORDS[split][draws.below(len(_WORDS[split]))]
        text = (word, word.capitalize(), word.lower())[draws.below(3)]
    else:
        digits = draws.between(2, 4)
        text = str(draws.between(10 ** (digits - 1), 10**digits - 1))
    fonts = pack().fonts[split]
    return SignText(text, fonts[draws.below(len(fonts))], colours[draws.below(len(colours))], draws.between(0, 7))


def line(text: str, font: Font) -> tuple[Bytes, tuple[int, int, int, int]]:
    """One line of text as coverage ``(height, width)``, and the box ``x0, y0, x1, y1`` of its ink.

    The height is the font's ascent and descent at ``Pack.glyph_em`` pixels an em; characters outside printable ASCII
    (a blank is allowed) raise KeyError.
    """
    sheet = pack().pyramid(font.file)[0][..., 0]
    blank = pack().glyph_em // 3
    pen, placed = 4, []
    for char in text:
        if char == " ":
            pen += blank
            continue
        left, width, bearing, advance = font.glyphs[char]
        placed.append((pen + bearing, left, width))
        pen += advance
    out = np.zeros((sheet.shape[0], pen + 8), np.uint8)
    for at, left, width in placed:
        start = max(at, 0)
        cut = out[:, start : start + width]
        np.maximum(cut, sheet[:, left : left + cut.shape[1]], out=cut)
    rows = np.flatnonzero((out >= 128).any(1))
    columns = np.flatnonzero((out >= 128).any(0))
    return out, (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def plate(sign: SignText) -> Plate:
    """The sign's texture: a plate with rounded corners, a rim, and its text in the middle."""
    cover, (x0, y0, x1, y1) = line(sign.text, sign.font)
    em = pack().glyph_em
    pad_x, pad_y, rim = em // 3, em // 4, em // 16
    # Even sizes down the pyramid keep its levels exact halvings.
    width = -(-(x1 - x0 + 2 * pad_x) // 16) * 16
    height = -(-(y1 - y0 + 2 * pad_y) // 16) * 16
    left, top = (width - (x1 - x0)) // 2, (height - (y1 - y0)) // 2
    face = np.array(PLATE_COLOURS[sign.colour], np.int32)
    bright = int(face @ np.array([299, 587, 114])) >= 140_000
    ink = np.array((24, 24, 28) if bright else (246, 246, 242), np.int32)
    # Twice the distance into the plate from its rounded edge, squared where a corner's arc decides.
    radius = sign.rounding * height // 16
    ys, xs = np.arange(height)[:, None], np.arange(width)[None, :]
    dx = np.maximum(np.maximum(2 * radius - 1 - 2 * xs, 2 * xs + 1 - 2 * (width - radius)), 0)
    dy = np.maximum(np.maximum(2 * radius - 1 - 2 * ys, 2 * ys + 1 - 2 * (height - radius)), 0)
    corner = (dx > 0) & (dy > 0)
    arc = dx * dx + dy * dy
    inside = ~corner | (arc <= 4 * radius * radius)
    edge = np.minimum(np.minimum(xs, width - 1 - xs), np.minimum(ys, height - 1 - ys)) < rim
    border = edge | (corner & (arc > 4 * max(radius - rim, 0) ** 2))
    rgba = np.empty((height, width, 4), np.uint8)
    rgba[..., 3] = np.where(inside, 255, 0)
    rgba[..., :3] = np.where(border[..., None], (face + ink) >> 1, face)
    text = cover[y0:y1, x0:x1, None].astype(np.int32)
    area = rgba[top : top + (y1 - y0), left : left + (x1 - x0), :3]
    area[...] = (area * (255 - text) + ink * text + 127) // 255
    levels = [rgba]
    while min(levels[-1].shape[:2]) >= 16 and len(levels) < 5:
        levels.append(halve(levels[-1]))
    return Plate(tuple(levels), (left, top, left + (x1 - x0), top + (y1 - y0)))
