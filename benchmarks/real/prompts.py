"""Twenty prompts for greedy answers: messages of a user, and beginnings of texts."""

MESSAGES = (
    "What is the capital of France?",
    "Explain in one sentence why the sky is blue.",
    "Write a short poem about the sea.",
    "List three fruits that are red.",
    "How many legs does a spider have?",
    "Translate 'good morning' into Spanish.",
    "Give me a recipe for pancakes.",
    "Who wrote Romeo and Juliet?",
    "What is 12 times 7?",
    "Write a Python function that adds two numbers.",
    "Summarise the story of Cinderella in two sentences.",
    "What should I take along on a walk in the mountains?",
)
TEXTS = (
    "The history of the steam engine begins",
    "Once upon a time, in a village by the river,",
    "Photosynthesis is the process by which",
    "def fibonacci(n):\n",
    "Dear Sir or Madam,\n\nI am writing to",
    "The three largest planets of the solar system are",
    "It was the best of times, it was",
    "In 1969, the first people",
)
