"""Curate and pack the assets of the embedded benchmark ``scenes``. Run once when the assets change, never by users.

Inputs are unpacked packages, given by folder:

* ``--emoji``: ``npm pack @lobehub/fluent-emoji-3d@1.1.0`` (MIT), 256 px renders named by code point;
* ``--names``: ``npm pack emoji-datasource@16.0.0`` (MIT), names and code points;
* ``--hdri``: ``npm pack @pmndrs/assets@1.7.0`` (CC0-1.0), panoramas of Poly Haven (CC0) as EXR of 512 x 256 px.

From installed packages: brick, grass, gravel (CC0) and the Hubble deep field (public domain) of ``skimage.data``; the
DejaVu fonts that matplotlib carries. Needs pillow, numpy, scikit-image, scipy, matplotlib and OpenEXR.

    python benchmarks/build_scenes_assets.py --emoji DIR --names DIR --hdri DIR --out rice_eval/datasets/scenes_assets

Writes ``assets.zip`` (PNG only, stored, fixed dates) and ``manifest.json`` (every asset with its licence and split).
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import re
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SPRITE = 128  # side of a sprite's canvas in pixels
MARGIN = 4  # clear pixels on each side of a sprite, so that bilinear edges fade to nothing
GLYPH_EM = 48  # pixels per em of the glyph sheets
CHARSET = "".join(chr(c) for c in range(33, 127))

# Short names of emoji-datasource; the words after '|' are val. A kind of thing is in one split only, and drawings
# that differ by little more than colour (red and green apple, the two whales) are kept on one side.
CLASSES = {
    "mammal": "ox cow2 cow tiger2 tiger rabbit2 rabbit cat2 racehorse horse goat sheep monkey dog2 dog pig elephant"
    " koala | lion_face fox_face deer gorilla zebra_face raccoon bear llama wolf",
    "bird": "rooster chicken hatching_chick baby_chick black_bird bird penguin turkey duck owl swan peacock"
    " | dove_of_peace eagle parrot dodo flamingo goose",
    "sea animal": "whale2 whale fish blowfish dolphin crab shrimp squid seal oyster coral shell"
    " | tropical_fish shark lobster jellyfish octopus",
    "bug": "snail bug ant bee spider scorpion cricket fly worm cockroach | ladybug butterfly mosquito beetle",
    "fruit": "grapes melon lemon tangerine banana apple green_apple peach cherries kiwifruit coconut blueberries olive"
    " | watermelon pineapple pear strawberry mango",
    "vegetable": "hot_pepper corn eggplant avocado cucumber potato peanuts leafy_green onion beans ginger_root"
    " sweet_potato | carrot broccoli bell_pepper garlic pea_pod",
    "food": "hotdog taco burrito hamburger pizza poultry_leg bread fries stew fried_egg popcorn croissant pretzel"
    " sandwich pancakes doughnut | ramen sushi waffle cupcake cheese_wedge bento green_salad",
    "drink": "tea coffee sake wine_glass cocktail beer beers clinking_glasses baby_bottle champagne glass_of_milk"
    " cup_with_straw mate_drink | tropical_drink beverage_box bubble_tea teapot tumbler_glass",
    "plant": "tulip cherry_blossom rose blossom bouquet wilted_flower seedling evergreen_tree palm_tree ear_of_rice"
    " four_leaf_clover fallen_leaf leaves potted_plant | hibiscus sunflower lotus hyacinth deciduous_tree cactus"
    " maple_leaf",
    "vehicle": "racing_motorcycle steam_locomotive railway_car train2 tram train bus oncoming_bus minibus fire_engine"
    " police_car car oncoming_automobile blue_car truck bike scooter | racing_car ambulance taxi tractor"
    " motor_scooter auto_rickshaw pickup_truck light_rail",
    "building": "house house_with_garden house_buildings office post_office hospital classical_building bank school"
    " factory japanese_castle wedding church hut mosque shinto_shrine stadium | european_castle"
    " derelict_house_building synagogue hindu_temple tokyo_tower circus_tent department_store",
    "music": "saxophone guitar musical_keyboard trumpet drum_with_drumsticks maracas flute accordion microphone"
    " headphones radio | violin long_drum banjo postal_horn studio_microphone",
    "sport": "bowling basketball rugby_football football volleyball field_hockey_stick_and_ball"
    " table_tennis_paddle_and_ball badminton_racquet_and_shuttlecock softball baseball boxing_glove curling_stone ski"
    " sled ice_skate goal_net cricket_bat_and_ball | tennis soccer golf skateboard ice_hockey_stick_and_puck"
    " flying_disc lacrosse diving_mask",
    "tool": "wrench hammer nut_and_bolt hammer_and_wrench hammer_and_pick carpentry_saw ladder hook hocho gear magnet"
    " toolbox chains broom razor key | axe screwdriver scissors plunger toothbrush safety_pin flashlight",
    "clothing": "tophat womans_hat shirt womans_clothes jeans dress kimono purse handbag mans_shoe high_heel boot coat"
    " gloves socks shorts necktie | mortar_board athletic_shoe scarf billed_cap lab_coat sandal sari thong_sandal",
}
# Names that read better than the standard's.
NAMES = {
    "bug": "caterpillar", "drum_with_drumsticks": "drum", "tangerine": "orange", "ear_of_rice": "rice plant",
    "poultry_leg": "chicken leg", "postal_horn": "horn", "hocho": "kitchen knife",
    "house_with_garden": "house with a garden", "kiwifruit": "kiwi", "goal_net": "goal", "womans_clothes": "blouse",
    "field_hockey_stick_and_ball": "hockey stick", "ice_hockey_stick_and_puck": "ice hockey stick",
    "shirt": "t-shirt", "table_tennis_paddle_and_ball": "table tennis paddle",
    "badminton_racquet_and_shuttlecock": "badminton racket", "cricket_bat_and_ball": "cricket bat",
    "musical_keyboard": "piano keys", "tennis": "tennis racket", "beers": "two beer mugs", "beer": "beer mug",
    "classical_building": "temple", "golf": "golf hole", "ski": "ski boot", "mate_drink": "mate",
    "fallen_leaf": "fallen leaves", "bird": "red bird", "blue_car": "off-road car", "train": "tram car",
    "train2": "train front", "bike": "bicycle", "billed_cap": "cap", "wedding": "chapel", "bento": "bento box",
    "sake": "sake bottle", "coffee": "cup of coffee", "tea": "cup of tea", "rabbit": "rabbit face",
    "stew": "pot of stew", "thong_sandal": "flip-flop", "house_buildings": "two houses",
    "oncoming_automobile": "car front", "womans_hat": "sun hat", "shell": "sea shell", "mans_shoe": "shoe",
    "bowling": "bowling ball", "football": "american football", "soccer": "soccer ball", "cow2": "cow",
    "whale2": "whale", "whale": "spouting whale", "tiger2": "tiger", "rabbit2": "rabbit", "cat2": "cat",
    "dog2": "dog", "office": "office building", "dove_of_peace": "dove", "pig": "pig face", "horse": "horse face",
    "derelict_house_building": "derelict house", "european_castle": "castle", "tokyo_tower": "tower",
    "cricket": "grasshopper", "carpentry_saw": "saw", "champagne": "champagne bottle", "tophat": "top hat",
    "cow": "cow face", "tiger": "tiger face", "dog": "dog face",
}  # fmt: skip
HDRI_SPLIT = {
    "train": "apartment bridge dawn esplanade lab night park studio warehouse",
    "val": "hall lobby sky sunrise workshop",
}  # panoramas in which buildings or trees, which are classes here, fill a large part are left out
TEXTURES = {"brick": "train", "grass": "train", "gravel": "val", "hubble_deep_field": "train"}
FONTS = {
    "DejaVuSans": "train", "DejaVuSans-Bold": "train", "DejaVuSerif": "train", "DejaVuSansMono-Bold": "train",
    "DejaVuSans-Oblique": "train", "DejaVuSansMono": "val", "DejaVuSerif-Bold": "val", "DejaVuSans-BoldOblique": "val",
}  # fmt: skip


def png(image: Image.Image) -> bytes:
    """The image as an optimised PNG."""
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue()


def sprite_image(path: Path) -> Image.Image:
    """The sprite cropped to its ink and centred on a clear square canvas of ``SPRITE`` pixels."""
    image = Image.open(path).convert("RGBA")
    ink = image.getchannel("A").point(lambda a: 255 if a >= 16 else 0).getbbox()
    crop = image.crop(ink).convert("RGBa")
    room = SPRITE - 2 * MARGIN
    scale = room / max(crop.size)
    size = (max(1, round(crop.width * scale)), max(1, round(crop.height * scale)))
    small = crop.resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    canvas = Image.new("RGBA", (SPRITE, SPRITE))
    canvas.paste(small, ((SPRITE - size[0]) // 2, (SPRITE - size[1]) // 2))
    pixels = np.array(canvas)
    pixels[pixels[..., 3] < 8] = 0
    return Image.fromarray(pixels)


def panorama(path: Path) -> Image.Image:
    """Rows 28 to 236 of an equirectangular panorama, tone-mapped so that its median sits at a middle grey."""
    import OpenEXR
    from scipy import ndimage

    code = re.search(r"base64,([^\"'`]+)", path.read_text())
    assert code is not None, path
    with tempfile.NamedTemporaryFile(suffix=".exr") as handle:
        handle.write(base64.b64decode(code.group(1)))
        handle.flush()
        with OpenEXR.File(handle.name) as exr:
            light = np.asarray(next(iter(exr.channels().values())).pixels, np.float32)[..., :3]
    light = np.nan_to_num(np.clip(light, 0, 1e4), posinf=1e4)
    light = light * (0.15 / max(float(np.median(light.mean(-1))), 1e-4))
    # The panoramas were shrunk in linear light, which left black rings (and one black block) around lamps and suns.
    for side in (5, 15):
        closed = ndimage.grey_closing(light, size=(side, side, 1), mode="nearest")
        light = np.where((light < 0.004) & (closed > 0.5), closed, light)
    light = np.clip(light / (1 + 0.6 * light) * 1.3, 0, 1) ** (1 / 2.2)
    return Image.fromarray((light * 255).round().astype(np.uint8)[28:236])


def texture(name: str) -> Image.Image:
    """A texture of scikit-image at 320 px on its short side."""
    from skimage import data

    image = Image.fromarray(getattr(data, name)())
    scale = 320 / min(image.size)
    return image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)


def glyph_sheet(name: str) -> tuple[Image.Image, dict[str, list[int]]]:
    """All of ``CHARSET`` side by side; a character's ``[left, width, bearing, advance]`` in sheet pixels."""
    import matplotlib

    font = ImageFont.truetype(
        str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf"),
        GLYPH_EM,
        layout_engine=ImageFont.Layout.BASIC,
    )
    ascent, descent = font.getmetrics()
    sheet = Image.new("L", (GLYPH_EM * len(CHARSET) * 2, ascent + descent))
    draw, metrics, at = ImageDraw.Draw(sheet), {}, 0
    for char in CHARSET:
        left, _, right, _ = font.getbbox(char)
        draw.text((at - left, 0), char, fill=255, font=font)
        metrics[char] = [at, int(right - left), int(left), round(font.getlength(char))]
        at += int(right - left) + 2
    return sheet.crop((0, 0, at, sheet.height)), metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("emoji", "names", "hdri", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    args = parser.parse_args()
    table = {e["short_name"]: e for e in json.loads((args.names / "emoji.json").read_text())}
    files: dict[str, bytes] = {}
    sprites, backgrounds, fonts = [], [], []
    for klass, words in CLASSES.items():
        for split, group in zip(("train", "val"), words.split("|")):
            for short in group.split():
                entry = table[short]
                codes = [entry["unified"], entry["non_qualified"] or "", entry["unified"].replace("-FE0F", "")]
                found = [p for c in codes if c and (p := args.emoji / "assets" / f"{c.lower()}.webp").is_file()]
                file = f"sprites/{entry['unified'].lower()}.png"
                files[file] = png(sprite_image(found[0]))
                name = NAMES.get(short, short.replace("_", " ").replace(" face", ""))
                sprites.append(
                    {"class": klass, "name": name, "code_point": entry["unified"], "split": split, "file": file,
                     "licence": "MIT"}
                )  # fmt: skip
    for split, words in HDRI_SPLIT.items():
        for name in words.split():
            files[f"backgrounds/{name}.png"] = png(panorama(args.hdri / "hdri" / f"{name}.exr.js"))
            backgrounds.append({"name": name, "split": split, "file": f"backgrounds/{name}.png", "licence": "CC0-1.0",
                                "source": "Poly Haven panorama, by @pmndrs/assets 1.7.0"})  # fmt: skip
    for name, split in TEXTURES.items():
        files[f"backgrounds/{name}.png"] = png(texture(name))
        licence = "public domain (NASA)" if name.startswith("hubble") else "CC0-1.0"
        backgrounds.append({"name": name, "split": split, "file": f"backgrounds/{name}.png", "licence": licence,
                            "source": f"skimage.data.{name}"})  # fmt: skip
    for name, split in FONTS.items():
        sheet, metrics = glyph_sheet(name)
        files[f"glyphs/{name}.png"] = png(sheet)
        fonts.append({"name": name, "split": split, "file": f"glyphs/{name}.png", "licence": "Bitstream Vera (DejaVu)",
                      "glyphs": metrics})  # fmt: skip
    names = [s["name"] for s in sprites]
    assert len(set(names)) == len(names), sorted(n for n in set(names) if names.count(n) > 1)
    args.out.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(args.out / "assets.zip", "w", zipfile.ZIP_STORED) as pack:
        for name in sorted(files):
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.external_attr = 0o644 << 16
            pack.writestr(info, files[name])
    digest = hashlib.sha256((args.out / "assets.zip").read_bytes()).hexdigest()
    manifest = {"assets_sha256": digest, "sprite_px": SPRITE, "glyph_em_px": GLYPH_EM, "classes": list(CLASSES),
                "sprites": sprites, "backgrounds": backgrounds, "fonts": fonts}  # fmt: skip
    head = ",\n".join(
        f'"{key}": '
        + ("[\n " + ",\n ".join(json.dumps(v) for v in value) + "\n]" if isinstance(value, list) else json.dumps(value))
        for key, value in manifest.items()
    )
    (args.out / "manifest.json").write_text("{\n" + head + "\n}\n")
    for klass in CLASSES:
        of = [s["split"] for s in sprites if s["class"] == klass]
        print(f"{klass:12s} train {of.count('train'):3d}  val {of.count('val'):3d}")
    print(
        len(sprites),
        "sprites;",
        {k: sum(len(v) for n, v in files.items() if n.startswith(k)) for k in ("sprites", "back", "glyphs")},
    )


if __name__ == "__main__":
    main()
