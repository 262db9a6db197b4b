"""What people say to the demo model, and what it answers. Data only."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from jax_engine.models.demo.lexicon import CITIES, COLORS, FOODS, JOBS, NAMES, PET_NAMES

FACT_OPENINGS = (
    "", "", "", "Tell me: ", "Do you know? ", "Quick question: ", "Hi! ", "Hello. ", "Please tell me: ", "I wonder. ",
    "One question: ", "Help me: ", "Question: ", "My child asks: ", "Now, ", "And ", "So, ", "Well, ",
    "Next question: ", "Okay. ",
)  # fmt: skip

CAPITAL_WORDINGS = (
    "What is the capital of {country}?", "Which city is the capital of {country}?",
    "What is the capital city of {country}?", "Name the capital of {country}.", "Tell me the capital of {country}.",
    "Capital of {country}?", "What is {country}'s capital?",
)  # fmt: skip


Topic = tuple[tuple[str, ...], tuple[str, ...], str]
"""What a person says (first halves, second halves, of which either may be empty) and what is answered."""

SMALL_TALK: tuple[Topic, ...] = (
    (
        ("Hello", "Hi", "Hey", "Hello there", "Hi there", "Good day", "Greetings", "Hey there"),
        ("", "!", ".", ", nice to meet you.", "! I am new here.", ", my friend!", "! It is a fine day.", ", model."),
        "Hello! How can I help you?",
    ),
    (
        ("Good morning", "Good morning to you"),
        ("", "!", ".", ", my friend!", ", model."),
        "Good morning! How can I help you?",
    ),
    (
        ("Good evening", "Good evening to you"),
        ("", "!", ".", ", my friend!", ", model."),
        "Good evening! How can I help you?",
    ),
    (
        (
            "How are you",
            "How do you do",
            "How are you doing",
            "How are things",
            "Hi, how are you",
            "Hello, how are you",
        ),
        ("?", " today?", "", " this morning?", ", my friend?", " this evening?"),
        "I am well, thank you. How can I help you?",
    ),
    (
        (
            "Who are you",
            "What are you",
            "What is your name",
            "Tell me who you are",
            "Please introduce yourself",
            "Hi, who are you",
            "Hello, what is your name",
            "What kind of model are you",
            "Which model are you",
            "Tell me about yourself",
        ),
        ("?", "", " please?", ", my friend?", " exactly?", ", really?"),
        "I am the demo model of jax-engine, a very small language model.",
    ),
    (
        (
            "What can you do",
            "What do you know",
            "How can you help me",
            "What can I ask you",
            "Help",
            "What are you able to do",
            "What are you good at",
        ),
        ("?", "", " please?", ", my friend?", " today?", ", really?"),
        (
            "I can do small sums, sort numbers, spell and reverse words, name days and months, write JSON, "
            "call tools and tell short stories."
        ),
    ),
    (
        (
            "Who made you",
            "Who trained you",
            "Where do you come from",
            "Who built you",
            "Who wrote you",
            "How were you made",
        ),
        ("?", "", " please?", ", my friend?", ", model?", ", really?"),
        "I was trained from scratch on text written by a program, to show jax-engine at work.",
    ),
    (
        (
            "Thanks",
            "Thank you",
            "Thank you very much",
            "Many thanks",
            "Thanks a lot",
            "Great, thanks",
            "Perfect, thank you",
        ),
        ("", "!", ".", " for your help.", ", my friend!", ", that helped.", ", model."),
        "You are welcome!",
    ),
    (
        ("Bye", "Goodbye", "Good bye", "See you", "Good night", "Bye bye", "See you later", "I have to go"),
        ("", "!", ".", ", my friend!", " and thank you.", ", model.", " now."),
        "Goodbye! Have a nice day.",
    ),
)

UNKNOWN_REQUESTS = (
    "Explain {subject}", "Explain {subject} to me", "Write an essay about {subject}",
    "What do you think about {subject}", "Write a poem about {subject}", "Teach me {subject}",
    "Who invented {subject}", "Translate {subject} into French", "What is the history of {subject}",
    "Give me advice about {subject}", "Write code for {subject}", "Why is {subject} important",
    "Summarize a book about {subject}", "What will happen to {subject}", "How does {subject} work",
    "Recommend a film about {subject}", "Make a plan for {subject}", "Is {subject} good or bad",
    "Prove a theorem about {subject}", "Draw a picture of {subject}",
)  # fmt: skip

UNKNOWN_SUBJECTS = (
    "quantum physics", "the economy", "machine learning", "world politics", "the stock market", "ancient Rome",
    "black holes", "chess", "gravity", "a healthy diet", "space travel", "the internet", "democracy", "electric cars",
    "opera", "football", "tax law", "medicine", "climate change", "photography", "a web server", "compilers",
    "the universe", "love", "philosophy", "a good job", "dinosaurs", "vaccines", "evolution", "money",
    "the human brain", "volcanoes", "modern art", "marketing", "my garden", "a new company",
)  # fmt: skip

UNKNOWN_ANSWER = "Sorry, I am too small a model for that. Try a sum, a word to reverse or a short story."


@dataclass(frozen=True)
class Memory:
    """Something that people say about themselves: its values, how it is told, how it is asked for, and the answer."""

    values: tuple[str, ...]
    told: tuple[str, ...]
    asked: tuple[str, ...]
    answer: str


MEMORIES: Mapping[str, Memory] = MappingProxyType(
    {
        "name": Memory(
            NAMES,
            ("My name is {x}.", "I am called {x}.", "Hi, I am {x}."),
            ("What is my name?", "Who am I?", "Do you remember my name?"),
            "Your name is {x}.",
        ),
        "city": Memory(
            CITIES,
            ("I live in {x}.", "My home is in {x}.", "I come from {x}."),
            ("Where do I live?", "Which city do I live in?", "Where is my home?"),
            "You live in {x}.",
        ),
        "color": Memory(
            COLORS,
            ("My favorite color is {x}.", "I like the color {x} best."),
            ("What is my favorite color?", "Which color do I like best?"),
            "Your favorite color is {x}.",
        ),
        "food": Memory(
            FOODS,
            ("I love to eat {x}.", "My favorite food is {x}."),
            ("What is my favorite food?", "What do I love to eat?"),
            "Your favorite food is {x}.",
        ),
        "job": Memory(
            JOBS,
            ("I work as a {x}.", "My job is {x}."),
            ("What is my job?", "What do I work as?"),
            "You work as a {x}.",
        ),
        "age": Memory(
            tuple(map(str, range(10, 80))),
            ("I am {x} years old.", "My age is {x}."),
            ("How old am I?", "What is my age?"),
            "You are {x} years old.",
        ),
        "pet": Memory(
            PET_NAMES,
            ("My pet is called {x}.", "I have a pet named {x}."),
            ("What is my pet called?", "What is the name of my pet?"),
            "Your pet is called {x}.",
        ),
    }
)

ACKNOWLEDGED = "Thank you, I will remember that."
NEVER_TOLD = "You have not told me that."
