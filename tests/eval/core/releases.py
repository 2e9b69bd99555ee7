"""Five samples of every benchmark as they are released, and the question file that LLaVA has for it."""

import base64
import io
import json

from PIL import Image

SHORT = "\nAnswer the question using a single word or phrase."
LETTER = "\nAnswer with the option's letter from the given choices directly."
MME_ASK = " Please answer yes or no."


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")


def lines(path, rows):
    write(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_image(path, number=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (10 * number, 99, 5)).save(path, "JPEG")


def vqav2(folder, llava):
    questions = [
        {"question_id": 10 + i, "image_id": i // 2, "question": f"What is thing {i}?"} for i in range(5)
    ]
    answers = ["red", "2", "dog", "yes", "left"]
    annotations = [
        {
            "question_id": q["question_id"], "image_id": q["image_id"], "question_type": f"type {i % 2}",
            "answer_type": "other", "multiple_choice_answer": a,
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": k} for k in range(1, 11)],
        }
        for i, (q, a) in enumerate(zip(questions, answers))
    ]  # fmt: skip
    head = {"info": {}, "data_subtype": "val2014"}
    write(folder / "v2_OpenEnded_mscoco_val2014_questions.json", head | {"questions": questions})
    write(folder / "v2_mscoco_val2014_annotations.json", head | {"annotations": annotations})
    for i in range(3):
        write_image(folder / "val2014" / f"COCO_val2014_{i:012d}.jpg", i)
    if llava:
        rows = [
            {"question_id": q["question_id"], "image": f"COCO_val2014_{q['image_id']:012d}.jpg",
             "text": q["question"] + SHORT, "category": "default"}
            for q in questions
        ]  # fmt: skip
        lines(folder / "llava_vqav2_mscoco_val2014.jsonl", rows)
    replies = ["Red.", "two", "a dog", "no", ""]  # the last two are wrong
    return {q["question"]: r for q, r in zip(questions, replies)}, 3 / 5


def gqa(folder, llava):
    questions, truth = {}, ["yes", "dog", "red", "no", "left"]
    for i, answer in enumerate(truth):
        questions[f"0{i}"] = {
            "question": f"What is object {i}?", "answer": answer, "imageId": f"n{i // 2}",
            "isBalanced": i < 4,
            "entailed": [], "equivalent": [], "groups": {"global": None, "local": "x"},
            "types": {"structural": "query" if i % 2 else "verify", "semantic": "obj", "detailed": "x"},
            "semantic": [{"operation": "select", "argument": "dog", "dependencies": []}],
        }  # fmt: skip
        write_image(folder / "images" / f"n{i // 2}.jpg", i // 2)
    write(folder / "testdev_balanced_questions.json", questions)
    if llava:
        rows = [
            {"question_id": name, "image": f"{q['imageId']}.jpg", "text": q["question"] + SHORT}
            for name, q in questions.items()
        ]
        lines(folder / "llava_gqa_testdev_balanced.jsonl", rows)
    replies = ["Yes.", "dog", "blue", "no!", "right"]  # right, right, wrong, wrong, not balanced
    return {q["question"]: r for q, r in zip(questions.values(), replies)}, 2 / 4


def textvqa(folder, llava):
    words = ["nokia", "stop", "mcdonald's", "10", "exit"]
    rows, tokens = [], []
    for i, word in enumerate(words):
        image = f"{i // 2:016x}"  # two questions about one image: LLaVA's ids repeat
        rows.append({
            "question_id": 37000 + i, "question": f"What does sign {i} say?", "image_id": image,
            "answers": [word] * 8 + ["unclear"] * 2, "set_name": "val",
        })  # fmt: skip
        tokens.append({"image_id": image, "ocr_tokens": ["A1", words[i // 2 * 2]]})
        write_image(folder / "train_images" / f"{image}.jpg", i // 2)
    write(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": rows})
    write(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": tokens})
    if llava:
        asked = [
            {"question_id": r["image_id"], "image": f"{r['image_id']}.jpg",
             "text": f"{r['question']}\nReference OCR token: A1, x{SHORT}", "category": "default"}
            for r in rows
        ]  # fmt: skip
        lines(folder / "llava_textvqa_val_v051_ocr.jsonl", asked)
    replies = ["Nokia", "STOP.", "McDonald's", "eleven", "unclear"]  # the last: two of ten agree
    return {r["question"]: a for r, a in zip(rows, replies)}, (3 + 0.6) / 5


def pope(folder, llava):
    rows, replies = [], {}
    for k, category in enumerate(("random", "popular", "adversarial")):
        part = [
            {"question_id": i + 1, "image": f"COCO_val2014_{i // 2:012d}.jpg",
             "text": f"Is there {category} thing {i} in the image?", "label": ("yes", "no")[i % 2]}
            for i in range(5)
        ]  # fmt: skip
        lines(folder / "coco" / f"coco_pope_{category}.json", part)
        for i, row in enumerate(part):
            rows.append({"question_id": 100 * k + i, "image": row["image"], "text": row["text"] + SHORT})
            rows[-1]["category"] = category
            replies[row["text"]] = "Yes, there is." if row["label"] == "yes" else "No"
            write_image(folder / "coco" / "val2014" / row["image"], i)
    replies["Is there random thing 0 in the image?"] = "no"  # yes three times: 2 TP, 1 FN
    if llava:
        lines(folder / "llava_pope_test.jsonl", rows)
    return replies, (2 * 1 * (2 / 3) / (1 + 2 / 3) + 1 + 1) / 3


def mme(folder, llava):
    from open_unitok.eval.understanding.mme import MME_TASKS

    replies, rows = {}, []
    for task in MME_TASKS:
        deep = task in ("artwork", "celebrity", "landmark", "posters", "scene")
        for i in range(2):
            texts = folder / task / ("questions_answers_YN" if deep else "")
            asked = [f"Is {task} image {i} right?", f"Is {task} image {i} wrong?"]
            gap = "  " if i else " "
            body = [f"{q}{gap}{MME_ASK.strip()}\t{a}\n" for q, a in zip(asked, ("Yes", "No"))]
            write(texts / f"{i:04d}.txt", "".join(body))
            name = f"{i:04d}.jpg"
            write_image(folder / task / ("images" if deep else "") / name, i)
            replies |= {asked[0]: "Yes", asked[1]: "no" if i else "yes"}  # the first image: one of two
            path = f"{task}/images/{name}" if deep else f"{task}/{name}"
            rows += [{"question_id": path, "image": path, "text": q + SHORT, "category": task} for q in asked]
    if llava:
        lines(folder / "llava_mme.jsonl", rows)
    return replies, 10 * 100 * (3 / 4 + 1 / 2)


def mmvet(folder, llava):
    rows = {
        f"v1_{i}": {"imagename": f"v1_{i}.jpg", "question": f"Explain joke {i}.", "answer": "x<AND>y",
                    "imagesource": "s", "capability": ["rec", "ocr"] if i % 2 else ["math"]}
        for i in range(5)
    }  # fmt: skip
    write(folder / "mm-vet.json", rows)
    replies = [{"id": f"v1_{i}", "replies": ["hm", str(i / 4)] if i == 2 else [str(i / 4)]} for i in range(5)]
    lines(folder / "replies.jsonl", replies)
    for row in rows.values():
        write_image(folder / "images" / row["imagename"])
    if llava:
        asked = [
            {"question_id": i, "image": r["imagename"], "text": r["question"]}
            for i, r in enumerate(rows.values())
        ]
        lines(folder / "llava-mm-vet.jsonl", asked)
    return {r["question"]: "because" for r in rows.values()}, 0.5


def vizwiz(folder, llava):
    rows = [
        {"image": f"VizWiz_val_{i:08d}.jpg", "question": f"What is can {i}?", "answer_type": "other",
         "answers": [{"answer": f"soup {i}", "answer_confidence": "yes"}] * 10, "answerable": 1}
        for i in range(5)
    ]  # fmt: skip
    write(folder / "val.json", rows)
    for i, row in enumerate(rows):
        write_image(folder / "val" / row["image"], i)
    if llava:
        asked = [
            {"question_id": i, "image": r["image"], "text": r["question"] + SHORT} for i, r in enumerate(rows)
        ]
        lines(folder / "llava_val.jsonl", asked)
    return {r["question"]: f"Soup {i}." if i < 4 else "unanswerable" for i, r in enumerate(rows)}, 4 / 5


def seedbench(folder, llava):
    rows = [
        {"answer": "ABCD"[i % 4], "choice_a": "w", "choice_b": "x", "choice_c": "y", "choice_d": "z",
         "data_id": f"d_{i}", "data_type": "video" if i == 4 else "image", "question": f"Which seed {i}?",
         "question_id": str(500 + i), "question_type_id": 10 if i == 4 else 1 + i % 2}
        for i in range(5)
    ]  # fmt: skip
    kinds = {"Scene Understanding": 1, "Instance Identity": 2, "Action Recognition": 10}
    write(folder / "SEED-Bench.json", {"question_type": kinds, "questions": rows})
    for i in range(4):
        write_image(folder / "SEED-Bench-image" / f"d_{i}", i)  # released without a suffix
    write_image(folder / "SEED-Bench-video-image" / "504.png")
    if llava:
        asked = [
            {"question_id": r["question_id"] if i else int(r["question_id"]), "text": r["question"] + LETTER,
             "image": "SEED-Bench-video-image/504.png" if i == 4 else f"SEED-Bench-image/{r['data_id']}"}
            for i, r in enumerate(rows)
        ]  # fmt: skip
        lines(folder / "llava-seed-bench.jsonl", asked)
    return {f"Which seed {i}?": reply for i, reply in enumerate(["A", "B", "C.", "d", "A"])}, 3 / 5


def scienceqa(folder, llava):
    problems = {
        str(i): {"question": f"Which science {i}?", "choices": ["ape", "bee"], "answer": i % 2,
                 "hint": "A hint.", "image": "image.png" if i < 3 else None,
                 "subject": "natural science", "split": "test"}
        for i in range(5)
    }  # fmt: skip
    write(folder / "problems.json", problems)
    write(folder / "pid_splits.json", {"train": [], "val": [], "test": list(problems)})
    for i in range(3):
        write_image(folder / "test" / str(i) / "image.png", i)
    if llava:
        rows = [
            {"id": name, "conversations": [
                {"from": "human",
                 "value": ("<image>\n" if p["image"] else "") + f"{p['question']}\nA. ape\nB. bee"}
            ]}
            for name, p in problems.items()
        ]  # fmt: skip
        write(folder / "llava_test_CQM-A.json", rows)
    replies = ["A", "B. bee", "The answer is A.", "E", "(A)"]  # E is beyond the options, (A) cannot be read
    return {f"Which science {i}?": r for i, r in enumerate(replies)}, 3 / 5


def mmbench(folder, llava):
    columns = [
        "index",
        "question",
        "hint",
        "A",
        "B",
        "C",
        "D",
        "answer",
        "category",
        "image",
        "source",
        "l2-category",
        "comment",
        "split",
    ]
    body, replies = [], {}
    for i in range(5):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), (max(i - 1, 0) * 50, 9, 9)).save(buffer, "JPEG")  # the first two share one
        encoded = base64.b64encode(buffer.getvalue()).decode()
        options = ["ape", "bee", "cat"]
        for turn in range(3):
            turned = options[turn:] + options[:turn]
            question, right = f"Which image {i}?", "ABC"[turned.index("ape")]
            cells = [i + turn * 1_000_000, question, "nan" if i else "A hint", *turned, "nan", right, "cat",
                     encoded, "s", "coarse", "nan", "dev"]  # fmt: skip
            body.append("\t".join(map(str, cells)))
            prompt = f"{question}\nA. {turned[0]}"
            replies[prompt] = f"({right})" if (i, turn) not in ((1, 2), (3, 0)) else "D"
    write(folder / "mmbench_dev_20230712.tsv", "\n".join(["\t".join(columns), *body]) + "\n")
    return replies, 3 / 5


BUILDERS = {
    f.__name__: f for f in (vqav2, gqa, textvqa, pope, mme, mmvet, vizwiz, seedbench, scienceqa, mmbench)
}
