"""Conversations of our own, in the form that `formats.parse` gives: {name: (messages, tools)}."""


def say(role, content, **more):
    return {"role": role, "content": content, **more}


def call(name, arguments, id):
    return {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(name, description, **properties):
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


SYSTEM = say("system", "Be brief.")
ASK, ANSWER = say("user", "Who wrote <Emma>?"), say("assistant", "Jane Austen.")
AGAIN = say("user", ' And "Persuasion"?\n')
LAST = say("assistant", "Jane Austen\nas well: Persuasion, 1817.")
CITY = {"type": "string", "description": "Which city, e.g. Zürich"}
TOOLS = [
    tool("weather", "The weather of a city", city=CITY),
    tool("add", "Adds two numbers", a={"type": "number"}, b={"type": "number"}),
]
WEATHER = call("weather", {"city": "Genève"}, "call00001")
SUM = call("add", {"a": 41, "b": 7.25}, "call00002")
RAIN = say("tool", '{"rain": true}', name="weather", tool_call_id="call00001")
TOTAL = say("tool", "48.25", name="add", tool_call_id="call00002")
UMBRELLA = say("assistant", "It rains. Take an umbrella.")
ADD, DONE = say("user", "Add them."), say("assistant", "Nearly fifty, and it rains.")
LOOK = say("assistant", "", tool_calls=[WEATHER], reasoning_content="I must look.")

CONVERSATIONS = {
    "single": ([ASK, ANSWER], None),
    "dialogue": ([ASK, ANSWER, AGAIN, LAST], None),
    "system": ([SYSTEM, ASK, ANSWER, AGAIN, LAST], None),
    "tool": ([ASK, ANSWER, say("user", "Rain?"), say("assistant", "", tool_calls=[WEATHER]), RAIN, UMBRELLA], TOOLS),
    "tools": ([SYSTEM, ADD, say("assistant", "Let me see.", tool_calls=[WEATHER, SUM]), RAIN, TOTAL, DONE], TOOLS),
    "unused": ([ASK, ANSWER], TOOLS[:1]),
    "thoughts": (
        [ASK, ANSWER | {"reasoning_content": "A novel of 1815."}, AGAIN, LAST | {"reasoning_content": "Hers too."}],
        None,
    ),
    "written": ([ASK, say("assistant", "<think>\nA novel.\n</think>\n\nJane Austen."), AGAIN, LAST], None),
    "thinking": ([ASK, LOOK, RAIN, UMBRELLA | {"reasoning_content": "So it rains."}], TOOLS),
}
