"""The text that `make-model`'s tokenizers are trained on: ours, self-contained and the same every time. Pure."""

from __future__ import annotations

PROSE = """
A relay race is run by several people and one baton. The first runner starts, gives everything for a short while, and
hands over. The next one has been waiting, already moving, one hand held out behind. Neither looks at the baton: they
trust the place and the moment. Most races are lost there, in the few steps where both hold it or nobody does.

Reading and writing are different work. Whoever reads a long letter takes in all its words at once, page by page, and is
busy with every thought they bring. Whoever writes the answer puts down one word after another, and between two words
looks back at all that was read. One reader can be slowed by many writers, and one writer must never wait for a reader.
So let one desk read and another one write, and carry the notes from the first desk to the second.

What is carried has to be whole. A note that arrives late, a note that belongs to somebody else, or half a note, is
worse than none: the answer would be fluent and wrong. Therefore every note has an owner, a name and an hour at which
it is torn up. Who comes after that hour is told so, politely, and the letter is read again.

Please tell me a story about a small machine that wanted to count the stars. It began at the eastern window, where the
roof of the old mill hides nothing. "One, two, three," said the machine, and by midnight it had come to four thousand.
"What will you do with the number?" asked the clock. "I will give it to the morning," said the machine, "because the
morning can't see them." The clock thought about this for an hour, struck twice, and never asked again.

How do you make bread? Mix 500 grams of flour, 350 grams of water, 10 grams of salt and 3 grams of yeast. Wait, fold,
wait again. Heat the oven to 240 degrees and bake for 35 minutes. Why does it rise? Because the yeast eats sugar and
breathes out gas, and the dough is strong enough to hold it. What if I have no yeast? Then keep flour and water in a jar
for a week, feed it every day, and it will come by itself.

def add(left: int, right: int) -> int:
    return left + right

for index, name in enumerate(["alpha", "beta", "gamma"]):
    print(f"{index}: {name}")

{"model": "baton", "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 16, "stream": true}
"""

_STEMS = """
answer arrange ask balance bell bind board boat book border branch bread bridge bright bring broad build burn call
calm candle carry castle chain chair chance change charge circle claim clean clear climb clock close cloud coast cold
collect colour common compare connect copper corner count country course cover cradle credit cross crowd current dance
danger deal deep desert desk detail differ dinner direct distant doctor door double draw dream drift drive dust early
earth east edge effort engine enter even event expect fair fall farm father feather field figure fill final finger
fire firm fish flame flat float floor flow flower follow forest form forward found frame free fresh friend front fruit
garden gather gentle glass gold grain grand grass great green ground group grow guard guess guide habit hammer hand
happen harbour hard harvest heart heavy height help hidden hill history hold hollow honest hope horse hour house
hundred hunt island iron journey judge jump keep kind king kitchen knot lamp land language large laugh law layer lead
learn leather letter level library lift light limit line linen listen little lock lone long machine major map march
mark market master matter meadow measure member memory metal middle mile mill mind minor mirror model moment month
moon morning mother mountain mouth move music narrow nation nature needle nest night noble noise north note number
ocean offer office open orange order other outside oven owner page paint paper parcel part party pass path pattern
pause peace pencil people pepper perfect person picture piece pilot place plain planet plant plate play pocket point
pole port post powder power present press price print prize problem proof proper public pull purple push quarter
question quick quiet rain raise range rapid rather reach ready reason record region reply report rest rice ride ring
ripe rise river road rock roof room root rope rough round route rule safe sail salt sand scale school science season
second secret seed sense serve settle seven shade shadow shape share sharp sheet shell shelter ship shore short
shoulder signal silent silver simple single sister sketch sky sleep slope slow small smooth snow soft soil solid sound
south space spark speak special speed spin spirit spring square stage stair stand star station steam steel step stick
still stone storage store storm story straight stream street strong subject sudden sugar summer supper supply surface
sweet swift table talk tall task teach temper tender tent term thick think thousand thread ticket tide timber tool
tower town trace track trade train travel tree trust turn twelve twist valley value vessel village visit voice wagon
wait walk wall warm watch water wave weather weight west wheel whisper white whole wide wild wind window winter wire
wisdom wonder wood word work world worth write year yellow young
"""
_ENDINGS = ("", "s", "ed", "ing", "er", "ly", "ness", "ful", "less", "able")


def training_text() -> list[str]:
    """The prose, then every stem with every ending, a line a stem: enough for a vocabulary of 4096 tokens."""
    return [*PROSE.strip().splitlines(), *(" ".join(stem + ending for ending in _ENDINGS) for stem in _STEMS.split())]
