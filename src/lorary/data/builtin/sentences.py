"""Classification of sentences composed from small grammars."""

from lorary.data.builtin.sampling import Dice, Item, SamplingPlan, drawn, words

SENTIMENTS = ("positive", "negative")
THINGS = words("soup film hotel book concert train service room song game meal garden phone show cake")
ADVERBS = words("really quite very simply truly rather")
OPINIONS = {
    "positive": words("lovely wonderful great superb charming pleasant delightful brilliant perfect tasty"),
    "negative": words("awful boring terrible dreadful poor dull horrible nasty useless disappointing"),
}

# Topic: who, does what.
TOPICS = {
    "sport": (
        ("The striker", "The goalkeeper", "Our team", "The runner", "The coach", "Her tennis club", "The swimmer"),
        ("won the final", "lost the match", "trained hard", "scored a goal", "broke a record", "joined the league"),
    ),
    "food": (
        ("The chef", "My aunt", "The baker", "The waiter", "Our cook", "The new cafe", "Her kitchen"),
        ("made fresh pasta", "baked a pie", "served hot soup", "roasted the chicken", "added more salt", "fried rice"),
    ),
    "music": (
        ("The singer", "The pianist", "Our choir", "The drummer", "The band", "Her orchestra", "The violinist"),
        ("played a waltz", "tuned the strings", "wrote a song", "sang in tune", "gave a concert", "learned a melody"),
    ),
    "weather": (
        ("The storm", "Heavy rain", "The cold wind", "Thick fog", "The snow", "A heat wave", "The thunder"),
        ("came from the north", "lasted for hours", "passed over", "returned at dawn", "got stronger", "eased"),
    ),
}
WHEN = ("today", "again", "yesterday", "this week", "on Monday", "last night")

STYLES = ("formal", "informal")
FORMAL = (
    ("Please", "Kindly", "You are requested to", "We ask you to", "May I invite you to", "We would be grateful if you"),
    ("submit the form", "confirm the appointment", "review the report", "contact our office", "attend the meeting"),
    ("at your convenience", "without delay", "by Friday", "in writing", "at your earliest opportunity"),
)
INFORMAL = (
    ("Hey,", "Yo,", "Hiya,", "Gonna", "Wanna", "Dude,"),
    ("grab a pizza", "hang out", "send me that pic", "check this out", "chill at mine", "watch the game"),
    ("later?", "lol", "ok?", "pls", "asap!", "tonight or what?"),
)

# What is asked for: how such questions begin.
QUESTION_FORMS = {
    "time": ("When did", "When will", "When should", "What day will", "At what hour did"),
    "place": ("Where did", "Where will", "Where should", "In what town did", "In what country did"),
    "person": ("Who saw", "Who made", "Who let", "Who heard", "Who will help"),
    "reason": ("Why did", "Why will", "Why should", "Why must", "For what reason did"),
}
ACTORS = ("the train", "our teacher", "the old ship", "your sister", "the dog", "the mayor", "their plane", "the bus")
ACTIONS = ("stop", "leave", "arrive", "turn back", "slow down", "get lost", "return", "wait")

TENSES = ("past", "present", "future")
PEOPLE = ("She", "He", "The farmer", "My friend", "The nurse", "Our guide", "The boy", "The pilot")
# Past, present and bare form.
VERBS = (
    ("painted", "paints", "paint"),
    ("washed", "washes", "wash"),
    ("opened", "opens", "open"),
    ("sold", "sells", "sell"),
    ("found", "finds", "find"),
    ("kept", "keeps", "keep"),
    ("broke", "breaks", "break"),
    ("drew", "draws", "draw"),
)
OBJECTS = ("the door", "a box", "the car", "an old chair", "the map", "two lamps", "the gate", "a red kite")


def _sentiment(dice: Dice) -> Item:
    label = dice.pick(SENTIMENTS)
    return Item(f"The {dice.pick(THINGS)} was {dice.pick(ADVERBS)} {dice.pick(OPINIONS[label])}.", label)


def _topic(dice: Dice) -> Item:
    label = dice.pick(tuple(TOPICS))
    subjects, predicates = TOPICS[label]
    return Item(f"{dice.pick(subjects)} {dice.pick(predicates)} {dice.pick(WHEN)}.", label)


def _style(dice: Dice) -> Item:
    label = dice.pick(STYLES)
    parts = FORMAL if label == "formal" else INFORMAL
    return Item(" ".join(dice.pick(part) for part in parts), label)


def _question(dice: Dice) -> Item:
    label = dice.pick(tuple(QUESTION_FORMS))
    return Item(f"{dice.pick(QUESTION_FORMS[label])} {dice.pick(ACTORS)} {dice.pick(ACTIONS)}?", label)


def _tense(dice: Dice) -> Item:
    number = dice.integer(0, 2)
    verb = dice.pick(VERBS)[number]
    return Item(f"{dice.pick(PEOPLE)} {'will ' * (number == 2)}{verb} {dice.pick(OBJECTS)}.", TENSES[number])


PLANS = (
    SamplingPlan("sentiment", "sentences", "Sentiment:", drawn(_sentiment), options=SENTIMENTS),
    SamplingPlan("topic", "sentences", "Topic:", drawn(_topic), options=tuple(TOPICS)),
    SamplingPlan("style", "sentences", "Formal or informal:", drawn(_style), options=STYLES),
    SamplingPlan("question_type", "sentences", "Asks for:", drawn(_question), options=tuple(QUESTION_FORMS)),
    SamplingPlan("tense", "sentences", "Tense:", drawn(_tense), options=TENSES),
)
