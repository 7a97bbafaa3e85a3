"""CLINC150: 22,500 requests to an assistant in 150 intents of ten domains, and 1,200 that are out of scope.

Origin: S. Larson et al., "An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction" (EMNLP 2019), data_full.json of
github.com/clinc/oos-eval (or one of its variants of the same form). Licence: CC BY 3.0.

The file has the parts train, val and test. Its validation part joins the training part unless `val` says otherwise, which is 120 + 30
texts to train on and 30 to test on in every intent. The domains are not in the file: the table here is the repository's own
(data/domains.json), 15 intents each, and gives the grouping `domain`; it is left out where a file has an intent that the table lacks.
The classes are numbered domain by domain, in the order of their names.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from streamcl.data_files import locate
from streamcl.errors import DataError
from streamcl.stream import SourceData

from ._index_files import json_file
from ._listed import Listed, ListedSource, Refused, numbered

DOMAINS = {
    "banking": "account_blocked balance bill_balance bill_due freeze_account interest_rate min_payment order_checks pay_bill pin_change "
    "report_fraud routing spending_history transactions transfer",
    "credit_cards": "application_status apr card_declined credit_limit credit_limit_change credit_score damaged_card expiration_date "
    "improve_credit_score international_fees new_card redeem_rewards replacement_card_duration report_lost_card rewards_balance",
    "kitchen_and_dining": "accept_reservations calories cancel_reservation confirm_reservation cook_time food_last how_busy "
    "ingredient_substitution ingredients_list meal_suggestion nutrition_info recipe restaurant_reservation restaurant_reviews "
    "restaurant_suggestion",
    "home": "calendar calendar_update next_song order order_status play_music reminder reminder_update shopping_list "
    "shopping_list_update smart_home todo_list todo_list_update update_playlist what_song",
    "auto_and_commute": "current_location directions distance gas gas_type jump_start last_maintenance mpg oil_change_how "
    "oil_change_when schedule_maintenance tire_change tire_pressure traffic uber",
    "travel": "book_flight book_hotel car_rental carry_on exchange_rate flight_status international_visa lost_luggage plug_type timezone "
    "translate travel_alert travel_notification travel_suggestion vaccines",
    "utility": "alarm calculator date definition find_phone flip_coin make_call measurement_conversion roll_dice share_location spelling "
    "text time timer weather",
    "work": "direct_deposit income insurance insurance_change meeting_schedule next_holiday payday pto_balance pto_request "
    "pto_request_status pto_used rollover_401k schedule_meeting taxes w2",
    "small_talk": "are_you_a_bot do_you_have_pets fun_fact goodbye greeting how_old_are_you meaning_of_life tell_joke thank_you "
    "what_are_your_hobbies what_can_i_ask_you what_is_your_name where_are_you_from who_do_you_work_for who_made_you",
    "meta": "cancel change_accent change_ai_name change_language change_speed change_user_name change_volume maybe no repeat "
    "reset_settings sync_device user_name whisper_mode yes",
}
OUT_OF_SCOPE = "oos"


class Clinc150(ListedSource):
    """`path` is the official JSON file, by default clinc150.json in the current folder or under STREAMCL_DATA. `out_of_scope` adds the
    class `oos` with its own training and test texts.

    `val` says what becomes of the validation part: it joins `train` or `test`, or is left out (`leave`). A record that is no pair of a text
    and an intent is an error, or left out and counted (`on_error: skip`).
    """

    licence = "CC BY 3.0"

    def __init__(
        self,
        *,
        path: Path | None = None,
        out_of_scope: bool = False,
        val: Literal["train", "test", "leave"] = "train",
        on_error: Literal["fail", "skip"] = "fail",
    ) -> None:
        super().__init__(on_error=on_error)
        self.path, self.out_of_scope, self.val = path or Path("clinc150.json"), out_of_scope, val

    def files(self) -> list[str]:
        return [str(locate(self.path))]

    def load(self) -> SourceData:
        file = locate(self.path)
        lists, refused = json_file(file), Refused(self.on_error)
        wanted = ["train", "val", "test"] + (["oos_train", "oos_val", "oos_test"] if self.out_of_scope else [])
        for name in wanted:
            if not isinstance(lists.get(name), list):
                raise DataError(f"{file}: the list {name!r} is missing, which CLINC150 has in its official form")
        rows: dict[str, list[tuple[str, str, str]]] = {"train": [], "test": [], "leave": []}
        for name in wanted:
            part = name.removeprefix("oos_")
            rows[self.val if part == "val" else part] += self._pairs(file, name, lists[name], refused)
        place_of = {intent: (domain, intent) for domain, its in enumerate(DOMAINS.values()) for intent in its.split()}
        names = sorted({intent for _, _, intent in rows["train"]}, key=lambda name: place_of.get(name, (len(DOMAINS), name)))
        number = {name: position for position, name in enumerate(names)}
        known = []
        for row in rows["test"]:
            if row[2] in number:
                known.append(row)
            else:
                refused.add("intent that training lacks", f"{row[0]}: the intent {row[2]!r} does not occur in training")
        train, test = (
            Listed({"text": [text for _, text, _ in part]}, numbered([number[intent] for _, _, intent in part]))
            for part in (rows["train"], known)
        )
        domains = [*DOMAINS, "out_of_scope"] if self.out_of_scope else list(DOMAINS)
        grouped = all(name in place_of or name == OUT_OF_SCOPE for name in names)
        if grouped:
            domain_of = numbered([place_of.get(name, (len(DOMAINS), name))[0] for name in names])
            for listed in (train, test):
                listed.groups["domain"] = domain_of[listed.targets]
        return self.assemble(train, test, names, refused, group_names={"domain": domains} if grouped else {})

    def _pairs(self, file: Path, name: str, records: list, refused: Refused) -> list[tuple[str, str, str]]:
        """Where each record stands, its text and its intent."""
        found = []
        for row, record in enumerate(records):
            place = f"{file}, {name}[{row}]"
            pair = isinstance(record, list) and len(record) == 2 and all(isinstance(value, str) and value.strip() for value in record)
            if pair:
                found.append((place, record[0], record[1]))
            else:
                refused.add("record that is no pair of a text and an intent", f"{place}: a pair of a text and an intent is needed")
        return found
