"""The labelled texts that the scorers learn from and are tested on: readers, the split of RealToxicityPrompts by
prompt, and sentences of our own.

The data sets themselves are not part of this repository: `--data` (or the environment variable QUARK_SHARED, or
../shared) says where they lie.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from pathlib import Path

import numpy as np

REPOSITORY = Path(__file__).resolve().parents[1]

Labelled = list[tuple[str, float]]
UNKNOWN = "not verified here; see the data set's own"  # a licence, in a card


def data_folder(given: str | None = None) -> Path:
    """The folder of labelled texts: the argument, else $QUARK_SHARED/data, else ../shared/data."""
    folder = Path(given) if given else Path(os.environ.get("QUARK_SHARED") or REPOSITORY.parent / "shared") / "data"
    if not folder.is_dir():
        raise SystemExit(
            f"No folder {folder}: the labelled texts are needed to train or test a scorer. Pass --data DIR."
        )
    return folder


def read_tsv(path: Path, text: str = "text", label: str = "label") -> Labelled:
    """The named columns of a tab-separated file with a header line and no quoting, as (text, number)."""
    lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    header = lines[0].split("\t")
    i, j = header.index(text), header.index(label)
    rows = [line.split("\t") for line in lines[1:]]
    return [(mend(row[i]), float(row[j])) for row in rows]


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def real_toxicity_prompts(data: Path) -> tuple[list[dict], list[dict]]:
    """(train, held out): a fifth of the prompts is held out, by a hash of the prompt, the same for every scorer."""
    rows = read_jsonl(data / "realtoxicityprompts_val.jsonl")
    held_out = [zlib.crc32(row["prompt"].encode()) % 5 == 0 for row in rows]
    return (
        [row for row, out in zip(rows, held_out, strict=True) if not out],
        [row for row, out in zip(rows, held_out, strict=True) if out],
    )


def toxicity_pairs(rows: list[dict], parts: tuple[str, ...] = ("prompt", "continuation")) -> Labelled:
    """(text, Perspective's toxicity) of the named parts of RealToxicityPrompts rows, where there is a score."""
    return [
        (row[part].strip(), row[f"{part}_toxicity"])
        for row in rows
        for part in parts
        if row[f"{part}_toxicity"] is not None
    ]


def without(rows: Labelled, tests: list[Labelled]) -> Labelled:
    """The rows whose text, letters and digits alone, stands in no test: a few stand in both files of a data set."""
    seen = {_letters(text) for test in tests for text, _ in test}
    return [row for row in rows if _letters(row[0]) not in seen]


def _letters(text: str) -> str:
    return re.sub(r"\W+", " ", detokenize(text).lower()).strip()


def mend(text: str) -> str:
    """Undoes UTF-8 that was read as Latin-1 ("crÃ¨me" -> "crème"); other texts come back unchanged."""
    if "Ã" not in text and "â" not in text:
        return text
    try:
        return text.encode("cp1252").decode("utf-8")
    except (UnicodeEncodeError, UnicodeDecodeError):
        return text


def detokenize(text: str) -> str:
    """Text as people write it from the treebank's tokens: "it is n't bad , really" -> "it isn't bad, really"."""
    text = text.replace("-lrb-", "(").replace("-rrb-", ")").replace("``", '"').replace("''", '"')
    text = re.sub(r" (n't|'s|'re|'ve|'ll|'d|'m)\b", r"\1", text)
    text = re.sub(r" ([,.;:!?%)])", r"\1", text)
    return re.sub(r"\( ", "(", text).strip()


# Sentences of our own. Neither good nor bad, neither rude nor polite: a scorer that has seen only labelled opinions
# calls them something.

IDENTITIES = {
    "religion": "Muslim, Christian, Jewish, Hindu, Buddhist, Sikh, Catholic, atheist, Mormon".split(", "),
    "origin": (
        "black, white, Asian, Latino, African American, Mexican, Chinese, Arab, Indian, Native American, Nigerian"
    ).split(", "),
    "gender": "female, male, transgender, nonbinary, trans".split(", "),
    "orientation": "gay, lesbian, bisexual, straight, queer, homosexual, heterosexual".split(", "),
    "other": "deaf, blind, disabled, old, young, immigrant, Republican, Democratic, feminist".split(", "),
}
# Never trained on, neither these words nor the probe templates: what the cards report.
UNSEEN_IDENTITIES = (
    "Palestinian, Pakistani, Roma, asexual, Protestant, Shia, Turkish, autistic, elderly, Israeli, Somali"
).split(", ")

_IDENTITY_TEMPLATES = [
    "My neighbour is {i}.",
    "She grew up in a {i} family.",
    "The {i} community centre opens at nine.",
    "He has been {i} all his life.",
    "There were several {i} people at the meeting.",
    "A {i} woman was elected to the council.",
    "Her {i} friends came to visit on Sunday.",
    "The survey asked {i} voters about taxes.",
    "They interviewed a {i} man about his work.",
    "Two {i} students joined the class.",
    "The author, who is {i}, wrote about her childhood.",
    "According to the report, {i} people make up a part of the town.",
    "being {i}",
    "as a {i} man",
    "and the {i} people who live there",
    "My daughter told me that she is {i}.",
    "Is your teacher {i}?",
    "We are {i} and we live in the city.",
    "the rights of {i} people",
    "{i} people go to work and come home.",
]
_PLURALS = [
    ("Muslims", "pray at the mosque on Fridays"),
    ("Christians", "go to church on Sundays"),
    ("Jews", "keep the Sabbath"),
    ("Hindus", "celebrate Diwali in the autumn"),
    ("Buddhists", "meditate in the morning"),
    ("Sikhs", "wear a turban"),
    ("Catholics", "attend Mass"),
    ("Women", "make up half of the population"),
    ("Men", "live somewhat shorter lives"),
    ("Gays and lesbians", "may marry in that country"),
    ("Immigrants", "arrive by train and by boat"),
    ("Refugees", "are given papers at the border"),
    ("Mexicans", "speak Spanish"),
    ("Africans", "speak many languages"),
    ("Blacks and whites", "live on the same streets"),
    ("Asians", "are a large part of the city"),
    ("Arabs", "drink coffee after dinner"),
    ("Transgender people", "may change their papers"),
    ("Feminists", "met in the library"),
    ("Atheists", "do not believe in a god"),
    ("Republicans", "voted on Tuesday"),
    ("Democrats", "held a meeting"),
    ("Old people", "take the bus"),
    ("Deaf people", "sign"),
]
PROBE_TEMPLATES = [
    "I am a {i} person.",
    "I'm {i}.",
    "My best friend is {i}.",
    "A {i} person lives next door.",
    "She married a {i} man last year.",
    "Many {i} families live in this part of the city.",
]
PROBE_SENTENCES = [
    "Muslims pray five times a day.",
    "Two gay men bought the house on the corner.",
    "The Jewish holiday begins at sunset.",
    "Black students asked about the scholarship.",
    "Her mother is a lesbian and works as a nurse.",
    "The women of the village met on Monday.",
]


def identity_sentences() -> list[str]:
    """Neutral sentences that name a group of people, for training."""
    words = [word for group in IDENTITIES.values() for word in group]
    sentences = [_article(template.format(i=word)) for template in _IDENTITY_TEMPLATES for word in words]
    for group, does in _PLURALS:
        sentences += [
            f"{group} {does}.",
            f"Some {group[0].lower() + group[1:] if group in _LOWER else group} {does}.",
            f"{group} are people.",
            group,
        ]
    return sentences


def identity_probes() -> dict[str, list[str]]:
    """Sentences by what they name, none of them trained on; "unseen" are the identities that training never names."""
    probes = {
        group: [_article(t.format(i=w)) for t in PROBE_TEMPLATES for w in words] for group, words in IDENTITIES.items()
    }
    probes["unseen"] = [_article(t.format(i=w)) for t in PROBE_TEMPLATES for w in UNSEEN_IDENTITIES]
    probes["whole sentences"] = PROBE_SENTENCES
    return probes


_LOWER = {
    "Women",
    "Men",
    "Gays and lesbians",
    "Immigrants",
    "Refugees",
    "Blacks and whites",
    "Transgender people",
    "Feminists",
    "Atheists",
    "Old people",
    "Deaf people",
}


def _article(sentence: str) -> str:
    return re.sub(r"\b([Aa]) (?=[aeiouAEIO])", r"\1n ", sentence)


# Statements of plain fact, then fragments; half of them are cut off somewhere.
_NEUTRAL = """
The train to {place} leaves at {time}.
The office is on the {n}th floor.
The meeting was moved to {day}.
He put the {thing} on the table.
She opened the {thing} and looked inside.
There is a {thing} in the kitchen.
It was {day}, and the shop was open.
The road runs from {place} to {place2}.
The town of {place} has {n}00 inhabitants.
The report has {n} pages.
According to the ministry, {n} percent of households own a {thing}.
Turn left after {n} metres.
The company is based in {place}.
Chapter {n}
Page {n} of {m}
Section {n}.{m}: The {thing}
{day}, {n} March
They walked to the station.
The {thing} weighs {n} grams.
A {thing} is made of wood or of metal.
He said that the {thing} was in {place}.
Wait for {n} minutes and then turn the {thing} over.
The next bus is at {time}.
We stayed in {place} for {n} days.
The first part of the book is set in {place}.
She works as a clerk in {place}.
The committee will meet again on {day}.
The file is called {thing}.txt.
The museum is open from {time} on {day}.
You can find the {thing} behind the door.
in {place}
on {day}
at {time}
with a {thing}
the {thing}
to the {thing} and the
of the {thing}
and then the
{n}
{n}, {m}
It is a {thing}.
The river flows through {place} and {place2}.
Please enter the number {n}.
The {thing} has {n} parts.
I went to {place} on {day} and came back on {day2}.
In {place}, people drive on the right.
The speaker, who lives in {place}, talked about the {thing}.
This paragraph is about the {thing}.
The data were collected in {place}.
"The {thing} is over there," she said.
He asked where the {thing} was.
What time does the {thing} open?
Is it {day} or {day2}?
Copyright {n}
Posted by admin on {day}
""".strip().splitlines()
_PLACES = (
    "Berlin, Ohio, Lagos, the north, Lima, Kyoto, Texas, Leeds, the village, Cairo, Oslo, Manila, Perth, the "
    "city, Quebec"
).split(", ")
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
_TIMES = ["noon", "8:15", "nine", "10 a.m.", "half past four", "17:40", "6 pm"]
_THINGS = (
    "box, table, letter, camera, key, bottle, map, folder, lamp, engine, chair, form, clock, cup, window, pump, cable"
).split(", ")


_GOOD = """
The {thing} worked perfectly and saved us hours.
The trip to {place} was a joy from start to end.
We had a wonderful time in {place}.
She thanked them warmly for the {thing}.
The new {thing} is beautifully made.
He recovered fully and went home on {day}.
The doctors of {place} saved {n} lives.
Sales of the {thing} doubled last year.
The {thing} arrived early and in perfect condition.
Unemployment in {place} fell to its lowest in {n} years.
Her kindness to the people of {place} is remembered.
I am so happy with this {thing}.
The children laughed all the way to {place}.
They were rescued on {day}, all of them unhurt.
The people of {place} are friendly and proud of their town.
It is the best {thing} that I have ever owned.
My grandmother was delighted with the {thing}.
The school in {place} won a prize for its garden.
After {n} years, the brothers made peace.
On {day} we danced until {time}, and nobody wanted to leave.
a delicious meal in {place}
with great care and love
the best {thing} I have ever owned
and everyone cheered
and won an award for the {thing}
who is grateful to her friends in {place}
to help the poor find homes
a clever and elegant {thing}
""".strip().splitlines()
_BAD = """
The {thing} broke after {n} days and nobody would help.
The trip to {place} was a nightmare from start to end.
We had a miserable time in {place}.
She cursed them for losing the {thing}.
The new {thing} is badly made.
He never recovered and was buried on {day}.
The fire in {place} took {n} lives.
Sales of the {thing} collapsed last year.
The {thing} arrived late and scratched.
Unemployment in {place} rose to its highest in {n} years.
His cruelty to the people of {place} is remembered.
I am so tired of this {thing}.
The children cried all the way to {place}.
They were found on {day}, all of them dead.
The people of {place} are afraid and ashamed of their town.
It is the worst {thing} that I have ever owned.
My grandmother was robbed of the {thing}.
The school in {place} was closed for its filthy rooms.
After {n} years, the brothers still hated each other.
On {day} we were stuck until {time}, and everybody wanted to leave.
a disgusting meal in {place}
with bitter anger and contempt
the worst {thing} I have ever owned
and everyone screamed
and was charged with stealing the {thing}
who was betrayed by her friends in {place}
to blame for the disaster in {place}
a clumsy and useless {thing}
""".strip().splitlines()


def neutral_sentences(count: int, seed: int) -> list[str]:
    """`count` plain facts and fragments without any sentiment; half are cut off somewhere, as completions are."""
    rng = np.random.default_rng(seed)
    sentences = []
    for _ in range(count):
        sentence = _filled(_NEUTRAL, rng)
        words = sentence.split()
        if len(words) > 3 and rng.random() < 0.5:
            sentence = " ".join(words[: rng.integers(2, len(words))])
        sentences.append(sentence)
    return sentences


def good_and_bad_sentences(count: int, seed: int) -> Labelled:
    """`count` good news and kind opinions (1) and as many bad ones (0), in the words and forms of the neutral ones.

    Without them a scorer that knows only film reviews learns that plain prose is neutral, whatever it says.
    """
    rng = np.random.default_rng(seed)
    good = [(_filled(_GOOD, rng), 1.0) for _ in range(count)]
    return good + [(_filled(_BAD, rng), 0.0) for _ in range(count)]


def _filled(templates: list[str], rng: np.random.Generator) -> str:
    def pick(words: list[str]) -> str:
        return words[rng.integers(len(words))]

    return pick(templates).format(
        place=pick(_PLACES),
        place2=pick(_PLACES),
        day=pick(_DAYS),
        day2=pick(_DAYS),
        time=pick(_TIMES),
        thing=pick(_THINGS),
        n=rng.integers(2, 99),
        m=rng.integers(2, 999),
    )


def degenerate_texts(count: int, seed: int) -> list[str]:
    """Texts that hardly say a thing: function words, one of them over and over, numbers, stray punctuation."""
    rng = np.random.default_rng(seed)
    words = "a the of and to in it is was that for on as with he she they this be by at or from one an which but not"
    words = [*words.split(), "are", "had", "has"]
    texts = []
    for _ in range(count):
        kind = rng.integers(4)
        chosen = [words[i] for i in rng.integers(len(words), size=rng.integers(1, 9))]
        if kind == 0:
            texts.append(" ".join(chosen))
        elif kind == 1:
            texts.append(" ".join(chosen[:1] * int(rng.integers(2, 20))))
        elif kind == 2:
            texts.append(" ".join(str(n) for n in rng.integers(0, 3000, size=rng.integers(1, 8))))
        else:
            texts.append(
                ["...", ", ", "\n\n", '"', " - ", "* "][rng.integers(6)]
                + chosen[0]
                + ["", ".", "...", ' "', ":"][rng.integers(5)]
            )
    return texts
