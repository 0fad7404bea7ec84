"""Built-in images that change as instructions say: edits (section 4.5), and stories of several changes.

`Stories` makes the scenes and the instructions between them, and `StoryDocuments` documents of these. `score`
has a model draw stories; `judge_change` says whether an image changed as its scene did, and all else stayed.
"""

import itertools
from collections import defaultdict
from dataclasses import replace

import numpy as np
from PIL import Image

from data import ImageSegment, PairDocuments
from extras.judge import judge, read_places, shares
from extras.scenes import COLOURS, PLACES, WIDTHS, Scenes, Shape, split_of

CHANGES = {"edits": 1, "stories": 2}  # how often a scene changes in these documents
# What is to be copied from an image is decided at high noise: at less, the noised image itself gives it away.
PRESETS = {
    "small_edit": dict(documents="edits", t_mean=2.0, guidance_scale=1.0, max_steps=1500),
    "small_story": dict(documents="stories", t_mean=2.0, seq_len=128, max_steps=1500),
}


class Stories:
    """Scenes that change, one thing at a time, as instructions say. Story number i is always the same.

    Each change is of another kind. No scene of a training story is held out or never seen. A story of
    another split ends in a scene of that split: this is what an edit draws. Nothing is removed in held-out
    stories, for one object alone is no combination.
    """

    KINDS = ("recolour", "move", "remove", "add")
    TRAINED = 8192  # training repeats so many stories (section 4.5: "8k")

    def __init__(self, grammar="places", image_size=32, split="train", seed=0, changes=1):
        self.scenes = Scenes(grammar, image_size, "train", seed)
        self.split, self.seed, self.changes = split, seed, changes

    def example(self, index):
        """Story number `index` -> (its Scenes, the instructions between them)."""
        splits = Scenes.SPLITS
        index = index % self.TRAINED if self.split == "train" else index
        rng = np.random.default_rng([self.seed, 10, splits.index(self.split), index])
        possible = [kind for kind in self.KINDS if (self.split, kind) != ("held_out", "remove")]
        kinds = rng.permutation(possible)[: self.changes]
        wanted = "train" if self.split == "seen" else self.split
        while True:
            scenes, instructions = [self.scenes.arrange(self.scenes.draw_objects(rng), rng)], []
            for kind in kinds:
                instruction, scene = self._change(scenes[-1], kind, rng)
                instructions.append(instruction)
                scenes.append(scene)
            found = [split_of(scene.objects) for scene in scenes]
            if all(instructions) and found[-1] == wanted == max(found, key=splits.index):
                return scenes, instructions

    def _change(self, scene, kind, rng):
        """A random change -> (instruction, the Scene after it); if there is none, ("", the same Scene)."""
        one = lambda choices: choices[rng.integers(len(choices))]
        i = rng.integers(len(scene.shapes))
        (new,) = self.scenes.arrange([one(self.scenes.objects)], rng).shapes
        ways = [] if scene.relation else list(self._ways(scene, i, kind, [new]))
        if not ways:
            return "", scene
        the = one(references(scene.shapes[i], scene.shapes))
        after, wordings = one(ways)
        return one(wordings).format(the), after

    def _ways(self, scene, i, kind, new):
        """Ways to change shape i, or to add one of `new`: (Scene after it, wordings) each. {} is its name."""
        shapes, cells = scene.shapes, self.scenes.cells
        taken = {shape.place for shape in shapes}
        free = [place for place in PLACES[cells] if place not in taken]
        if kind == "recolour":
            for colour in COLOURS:
                if colour != shapes[i].colour:
                    yield exchange(scene, i, replace(shapes[i], colour=colour)), [f"make {{}} {colour}"]
        if kind == "move":
            for place in free:
                there, words = moved(shapes[i], place, cells)
                yield exchange(scene, i, there), [f"move {{}} to the {word}" for word in words]
        if kind == "remove" and len(shapes) > 1:
            yield exchange(scene, i), ["remove {}"]
        if kind == "add" and len(shapes) < self.scenes.max_objects:
            for shape in new:
                if shape.place in free:
                    yield exchange(scene, len(shapes), shape), [f"add {shape}"]

    def following(self, scene):
        """All that a scene allows: {instruction: the Scene after it}. What is added stands mid-place."""
        cells, new, found = self.scenes.cells, [], {}
        places = enumerate(PLACES[cells])
        for size, thing, (n, place) in itertools.product(self.scenes.sizes, self.scenes.objects, places):
            x, y = (n % cells + 0.5) / cells, (n // cells + 0.5) / cells
            new.append(Shape(*thing, size, x, y, WIDTHS[size], place))
        for i, shape in enumerate(scene.shapes):
            for the, kind in itertools.product(references(shape, scene.shapes), self.KINDS):
                for after, wordings in self._ways(scene, i, kind, []):
                    found |= {words.format(the): after for words in wordings}
        for after, (words,) in self._ways(scene, 0, "add", new):
            found[words] = after
        return found

    def pair(self, index):
        """An image of a story, and the caption or the instruction before it: (text, load)."""
        story, k = divmod(index, self.changes + 1)
        scenes, instructions = self.example(story)
        return [scenes[0].caption, *instructions][k], scenes[k].render

    def name(self, index):
        """What messages call it."""
        return f"story {index}"


def exchange(scene, i, *new):
    """The scene with `new` in the place of its shape number i."""
    return replace(scene, shapes=(*scene.shapes[:i], *new, *scene.shapes[i + 1 :]))


def moved(shape, place, cells):
    """A shape at another place, moved by whole cells, and the words for it: "top left", or the side alone."""
    before, after = PLACES[cells].index(shape.place), PLACES[cells].index(place)
    x = shape.x + (after % cells - before % cells) / cells
    y = shape.y + (after // cells - before // cells) / cells
    side = [word for word in place.split() if word not in shape.place]
    words = [place, *side] if cells == 2 and len(side) == 1 else [place]
    return replace(shape, place=place, x=x, y=y), words


def references(shape, shapes):
    """The names that mean this shape alone: "the circle", "the red circle" ...; "it" if there is no other."""
    names = lambda s: [f"the {s.kind}", f"the {s.colour} {s.kind}", f"the{str(s)[1:]}"]
    others = [name for other in shapes if other is not shape for name in names(other)]
    found = [name for name in names(shape) if name not in others]
    return found if others else [*found, "it"]


class StoryDocuments(PairDocuments):
    """Edits and stories as documents; `pairs` are Stories."""

    def __call__(self, number):
        """An edit: <BOI> input <EOI> instruction <BOI> output <EOI>, and the input is clean.

        Nothing is dropped, for an image and an instruction leave too little open for guidance to sharpen.
        A story: caption <BOI> image <EOI> instruction <BOI> image <EOI> ... A sampled image has finished ones
        before it. So one image is picked. Those before it are clean; it is noised, and so are those after it,
        which see noised ones as in the paper's training. Later ones are picked more often: they must learn to
        look at images.
        """
        scenes, instructions = self.pairs.example(number)
        if len(scenes) == 2:
            before, after = scenes
            ids = self.tokenizer.encode(instructions[0])
            return [ImageSegment(before.render, 0), ids, ImageSegment(after.render, self.timesteps)]
        u, drop = np.random.default_rng([self.seed, 7, number]).random(2)
        picked = int(len(scenes) * u**0.5)  # of three images: 1, 3 and 5 times in 9
        caption = "" if drop < self.config.drop_caption else scenes[0].caption
        document = []
        for k, (text, scene) in enumerate(zip([caption, *instructions], scenes)):
            image = ImageSegment(scene.render, self.timesteps if k >= picked else 0)
            document += [self.tokenizer.encode(text), image]
        return document


def judge_change(before, after, pixels_before, pixels, grammar):
    """Has an image changed as its scene did, from the Scene `before` to `after`? -> {aspect: bool}.

    scene: the new image shows `after`, as `judge` sees it. changed: what was asked is done. kept: all else
    is as in the image before, right or wrong. Centres may be off by 1/32 of the side, widths by 2/32. all:
    the three.
    """
    old = next((shape for shape in before.shapes if shape not in after.shapes), None)
    new = next((shape for shape in after.shapes if shape not in before.shapes), None)
    ground, was = read_places(pixels_before, grammar)
    ground_now, now = read_places(pixels, grammar)
    as_wide = lambda a, b: abs(a.width - b.width) < 2.01 / 32

    def same(a, b, colour=True, dx=0.0, dy=0.0):
        """Is b the shape a, moved by (dx, dy)?"""
        if not (a and b) or a.kind != b.kind or (colour and a.colour != b.colour):
            return False
        return max(abs(a.x + dx - b.x), abs(a.y + dy - b.y)) < 1.01 / 32 and as_wide(a, b)

    others = (was.keys() | now.keys()) - {shape.place for shape in (old, new) if shape}
    kept = ground == ground_now and all(same(was.get(place), now.get(place)) for place in others)
    left = now.get(old.place) if old else None  # what is now where the shape was
    taken = now.get(new.place) if new else None  # what is now where it should be
    if not new:
        changed = not left
    elif not old:
        drawn = read_places(after.render(), grammar)[1][new.place]
        right = taken and (taken.colour, taken.kind) == (new.colour, new.kind)
        changed = bool(right and as_wide(taken, drawn))
    else:
        moves = old.place != new.place
        changed = bool(taken) and (not left if moves else taken.colour == new.colour)
        way = (new.x - old.x, new.y - old.y) if taken else (0.0, 0.0)  # what was not moved is to be as it was
        kept = kept and same(was.get(old.place), taken or left, moves, *way)
    scene = judge(after.caption, pixels, grammar)["all"]
    return {"all": scene and changed and kept, "scene": scene, "changed": changed, "kept": kept}


def tell(trained, stories, generate, seed=0):
    """Have stories drawn, image by image, each after those that the model drew before -> list of documents.

    stories: (scenes, instructions) each. A model of edits is given the first image, others its caption.
    """
    edits, n = trained.extra.documents == "edits", len(stories)
    documents = [[Image.fromarray(scenes[0].render())] if edits else [] for scenes, _ in stories]
    texts = [texts if edits else [scenes[0].caption, *texts] for scenes, texts in stories]
    for k in range(len(texts[0])):
        documents = [[*document, text[k]] for document, text in zip(documents, texts)]
        seeds = range(seed + k * n, seed + (k + 1) * n)  # other noise for each image of a story
        documents = generate(trained, documents, seeds, max_tokens=0)
    return documents


def story_accuracy(trained, stories, generate, seed=0):
    """Have stories drawn, their instructions given, and judge them -> {what: {aspect: share, "n": how many}}.

    what: "edits"; or "stories", which are right if all their images are, and "picture 1" and so on. Then the
    changes once more, by the first word of the instruction.
    """
    grammar, whole, by_word = trained.extra.grammar, defaultdict(list), defaultdict(list)
    for (scenes, instructions), document in zip(stories, tell(trained, stories, generate, seed)):
        images = [np.array(part) for part in document if not isinstance(part, str)]
        verdicts = []
        for k, instruction in enumerate(instructions):
            verdicts.append(judge_change(*scenes[k : k + 2], *images[k : k + 2], grammar))
            by_word[instruction.split()[0]].append(verdicts[k])
        if trained.extra.documents == "edits":
            whole["edits"] += verdicts
            continue
        verdicts.insert(0, {"all": judge(scenes[0].caption, images[0], grammar)["all"]})
        whole["stories"].append({"all": all(verdict["all"] for verdict in verdicts)})
        for k, verdict in enumerate(verdicts, start=1):
            whole[f"picture {k}"].append(verdict)
    return summary(whole | dict(sorted(by_word.items())))


def summary(rows):
    """{what: list of verdicts} -> {what: {aspect: share, "n": how many}}."""
    return {what: shares(verdicts) | {"n": len(verdicts)} for what, verdicts in rows.items()}


def own_story_accuracy(trained, scenes, source, generate, seed=0):
    """The same for a model that is given the first caption alone, and writes the instructions itself.

    source: such Stories. "own words": the share of instructions that the scene allows. "own stories": of
    stories in which all are such and all images right.
    """
    grammar, n = source.scenes.grammar, 1 + source.changes
    prompts = [[scene.caption] for scene in scenes]
    documents = generate(trained, prompts, range(seed, seed + len(scenes)), max_images=n)
    nothing = Image.new("RGB", (8, 8))
    told, right = [], []
    for scene, document in zip(scenes, documents):
        parts = [*document[1:], *[""] * 2 * n]  # image, instruction, image, ...
        images = [np.array(part if isinstance(part, Image.Image) else nothing) for part in parts[: 2 * n : 2]]
        verdict = judge(scene.caption, images[0], grammar)["all"]
        for k in range(source.changes):
            before, scene = scene, scene and source.following(scene).get(str(parts[2 * k + 1]).strip())
            told.append({"all": scene is not None})
            verdict = verdict and scene and judge_change(before, scene, *images[k : k + 2], grammar)["all"]
        right.append({"all": bool(verdict)})
    return summary({"own words": told, "own stories": right})


def score(trained, split, judged, seed, generate):
    """The scores of so many edits or stories of a split: {what: {aspect: share, "n": how many}}."""
    kind, options = trained.extra.documents, (trained.extra.grammar, trained.data.image_size, split, seed)
    source = Stories(*options, CHANGES[kind])
    found = story_accuracy(trained, [source.example(i) for i in range(judged)], generate, seed)
    if kind == "stories":
        scenes = map(Scenes(*options).example, itertools.count())
        first = (scene for scene in scenes if not scene.relation)  # any that is not told by a relation
        found |= own_story_accuracy(trained, list(itertools.islice(first, judged)), source, generate, seed)
    return found
