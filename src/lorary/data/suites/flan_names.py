"""The 256 tasks of Flan v2 that the paper trains on: names of data sets, and of their templates or versions."""

# Data set (or group of data sets): what follows its name. Names of tasks are both, joined by an underscore.
TEMPLATES = {
    "adversarial_qa": (
        "dbert_answer_the_following_q dbert_based_on dbert_generate_question dbert_question_context_answer "
        "dbert_tell_what_it_is dbidaf_answer_the_following_q dbidaf_based_on dbidaf_generate_question "
        "dbidaf_question_context_answer dbidaf_tell_what_it_is droberta_answer_the_following_q "
        "droberta_based_on droberta_generate_question droberta_question_context_answer "
        "droberta_tell_what_it_is"
    ),
    "anli": "r1_0_1_0 r2_0_1_0 r3_0_1_0",
    "app_reviews": ("categorize_rating_using_review convert_to_rating convert_to_star_rating generate_review"),
    "cos_e_v1_11": (
        "aligned_with_common_sense description_question_option_id description_question_option_text "
        "explain_why_human generate_explanation_given_text i_think question_description_option_id "
        "question_description_option_text question_option_description_id question_option_description_text "
        "rationale"
    ),
    "cot": (
        "creak creak_ii ecqa ecqa_ii esnli esnli_ii gsm8k gsm8k_ii qasc sensemaking sensemaking_ii strategyqa "
        "strategyqa_ii"
    ),
    "dbpedia_14": (
        "given_a_choice_of_categories_ given_a_list_of_category_what_does_the_title_belong_to "
        "given_list_what_category_does_the_paragraph_belong_to pick_one_category_for_the_following_text"
    ),
    "dream": (
        "answer_to_dialogue baseline generate_first_utterance generate_last_utterance "
        "read_the_following_conversation_and_answer_the_question"
    ),
    "duorc_ParaphraseRC": (
        "answer_question build_story_around_qa decide_worth_it extract_answer generate_question "
        "generate_question_by_answer movie_director question_answering title_generation"
    ),
    "duorc_SelfRC": (
        "answer_question build_story_around_qa decide_worth_it extract_answer generate_question "
        "generate_question_by_answer movie_director question_answering title_generation"
    ),
    "gem": "common_gen_1_1_0 dart_1_1_0 e2e_nlg_1_1_0 web_nlg_en_1_1_0 wiki_lingua_english_en_1_1_0",
    "glue": "cola_2_0_0 mnli_2_0_0 mrpc_2_0_0 qnli_2_0_0 qqp_2_0_0 sst2_2_0_0 stsb_2_0_0 wnli_2_0_0",
    "kilt_tasks_hotpotqa": "combining_facts complex_question final_exam formulate straighforward_qa",
    "qasc": (
        "is_correct_1 is_correct_2 qa_with_combined_facts_1 qa_with_separated_facts_1 "
        "qa_with_separated_facts_2 qa_with_separated_facts_3 qa_with_separated_facts_4 "
        "qa_with_separated_facts_5"
    ),
    "quail": (
        "context_description_question_answer_id context_description_question_answer_text "
        "context_description_question_text context_question_answer_description_id "
        "context_question_answer_description_text context_question_description_answer_id "
        "context_question_description_answer_text context_question_description_text "
        "description_context_question_answer_id description_context_question_answer_text "
        "description_context_question_text no_prompt_id no_prompt_text"
    ),
    "quarel": "choose_between do_not_use heres_a_story logic_test testing_students",
    "quartz": (
        "answer_question_based_on answer_question_below given_the_fact_answer_the_q having_read_above_passage "
        "paragraph_question_plain_concat read_passage_below_choose use_info_from_paragraph_question "
        "use_info_from_question_paragraph"
    ),
    "quoref": (
        "Answer_Friend_Question Answer_Question_Given_Context Answer_Test Context_Contains_Answer Find_Answer "
        "Found_Context_Online Given_Context_Answer_Question Guess_Answer Guess_Title_For_Context "
        "Read_And_Extract_ What_Is_The_Answer"
    ),
    "race_high": (
        "Is_this_the_right_answer Read_the_article_and_answer_the_question_no_option_ Select_the_best_answer "
        "Select_the_best_answer_generate_span_ Select_the_best_answer_no_instructions_ Taking_a_test "
        "Write_a_multi_choice_question_for_the_following_article Write_a_multi_choice_question_options_given_"
    ),
    "race_middle": (
        "Is_this_the_right_answer Read_the_article_and_answer_the_question_no_option_ Select_the_best_answer "
        "Select_the_best_answer_generate_span_ Select_the_best_answer_no_instructions_ Taking_a_test "
        "Write_a_multi_choice_question_for_the_following_article Write_a_multi_choice_question_options_given_"
    ),
    "ropes": (
        "background_new_situation_answer background_situation_middle given_background_situation "
        "new_situation_background_answer plain_background_situation plain_bottom_hint plain_no_background "
        "prompt_beginning prompt_bottom_hint_beginning prompt_bottom_no_hint prompt_mix "
        "read_background_situation"
    ),
    "sciq": (
        "Direct_Question Direct_Question_Closed_Book_ Multiple_Choice Multiple_Choice_Closed_Book_ "
        "Multiple_Choice_Question_First"
    ),
    "social_i_qa": (
        "Check_if_a_random_answer_is_valid_or_not Generate_answer Generate_the_question_from_the_answer "
        "I_was_wondering Show_choices_and_generate_answer Show_choices_and_generate_index"
    ),
    "squad": "v1_1_3_0_0 v2_0_3_0_0",
    "stream": "aqua aqua_ii qed qed_ii",
    "super_glue": "cb_1_0_2 copa_1_0_2 multirc_1_0_2 record_1_0_2 rte_1_0_2 wic_1_0_2 wsc_fixed_1_0_2",
    "web_questions": (
        "get_the_answer potential_correct_answer question_answer short_general_knowledge_q whats_the_answer"
    ),
    "wiki_bio": "comprehension guess_person key_content what_content who",
    "wiki_hop_original": (
        "choose_best_object_affirmative_1 choose_best_object_affirmative_2 choose_best_object_affirmative_3 "
        "choose_best_object_interrogative_1 choose_best_object_interrogative_2 explain_relation "
        "generate_object generate_subject generate_subject_and_object"
    ),
    "wiki_qa": (
        "Decide_good_answer Direct_Answer_to_Question Generate_Question_from_Topic Is_This_True_ "
        "Jeopardy_style Topic_Prediction_Answer_Only Topic_Prediction_Question_Only "
        "Topic_Prediction_Question_and_Answer_Pair automatic_system exercise found_on_google"
    ),
    "wiqa": (
        "does_the_supposed_perturbation_have_an_effect effect_with_label_answer effect_with_string_answer "
        "what_is_the_final_step_of_the_following_process what_is_the_missing_first_step "
        "what_might_be_the_first_step_of_the_process what_might_be_the_last_step_of_the_process "
        "which_of_the_following_is_the_supposed_perturbation"
    ),
    "wmt14_translate": "fr_en_1_0_0",
    "wmt16_translate": "de_en_1_0_0 fi_en_1_0_0 ro_en_1_0_0 tr_en_1_0_0",
}
# Data sets with one task each.
SINGLE = (
    "aeslc_1_0_0 ag_news_subset_1_0_0 cnn_dailymail_3_4_0 coqa_1_0_0 cosmos_qa_1_0_0 "
    "definite_pronoun_resolution_1_1_0 drop_2_0_0 fix_punct gigaword_1_2_0 huggingface_xsum "
    "imdb_reviews_plain_text_1_0_0 lambada_1_0_0 math_dataset_algebra__linear_1d_1_0_0 multi_news_1_0_0 "
    "natural_questions_open_1_0_0 para_crawl_enes paws_wiki_1_1_0 quac_1_0_0 snli_1_1_0 trec_1_0_0 "
    "trivia_qa_rc_1_1_0 true_case unified_qa_science_inst word_segment yelp_polarity_reviews_0_2_0"
)

# Family of each task: its data set, or itself.
FLAN_TASKS = {f"{name}_{suffix}": name for name, listed in TEMPLATES.items() for suffix in listed.split()} | {
    name: name for name in SINGLE.split()
}
