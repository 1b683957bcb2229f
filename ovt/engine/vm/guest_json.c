/* Part of guest.c: growing buffers, base64, and JSON, all three for input that nobody has vouched for.
 *
 * The reader works in place on one line and fills a fixed array of nodes; strings become C strings, so one with a NUL
 * in it is refused. The writer makes valid UTF-8 of anything, because file names and host names need not be.
 */
enum { NODES = 16384, DEPTH = 16 };
enum type { NONE, NULL_VALUE, BOOLEAN, INTEGER, REAL, STRING, ARRAY, OBJECT };

struct buffer {
    char *data;
    size_t length, capacity;
    int failed;              /* there was no memory for something that should be in it */
};

struct node {
    enum type type;
    const char *key;         /* of a member of an object */
    const char *text;        /* STRING */
    int64_t number;          /* INTEGER, BOOLEAN */
    int next, first;         /* the next in the same array or object, the first inside this one; 0: none */
};

static struct node nodes[NODES];
static int node_count;
static struct { char *at, *end; const char *error; } json;

/* What the command in hand failed with; the first report stays. */
static struct { int set, number; const char *class; char text[512]; } problem;

__attribute__((format(printf, 1, 2)))
static void fail(const char *format, ...) {
    if (problem.set)
        return;
    va_list list;
    va_start(list, format);
    vsnprintf(problem.text, sizeof problem.text, format, list);
    va_end(list);
    problem.set = 1;
    problem.class = "GenericError";
}

static void fail_errno(int number, const char *what, const char *which) {
    if (problem.set)
        return;
    fail("%s %s: %s", what, which, strerror(number));
    problem.number = number;
}

/* --- buffers --- */

static char *reserve(struct buffer *buffer, size_t more) {
    if (buffer->failed)
        return NULL;
    if (buffer->capacity - buffer->length < more) {
        size_t capacity = buffer->capacity ? buffer->capacity : 256;
        while (capacity - buffer->length < more)
            capacity *= 2;
        char *data = realloc(buffer->data, capacity);
        if (!data) {
            buffer->failed = 1;
            return NULL;
        }
        buffer->data = data;
        buffer->capacity = capacity;
    }
    return buffer->data + buffer->length;
}

static void put(struct buffer *buffer, const void *data, size_t length) {
    char *to = length ? reserve(buffer, length) : NULL;
    if (to) {
        memcpy(to, data, length);
        buffer->length += length;
    }
}

static void consume(struct buffer *buffer, size_t length) {
    buffer->length -= length;
    memmove(buffer->data, buffer->data + length, buffer->length);
}

static void clear(struct buffer *buffer) {
    free(buffer->data);
    *buffer = (struct buffer){ 0 };
}

__attribute__((format(printf, 2, 3)))
static void print(struct buffer *buffer, const char *format, ...) {
    char text[256];          /* numbers and fixed words only: strings go through put_string */
    va_list list;
    va_start(list, format);
    int length = vsnprintf(text, sizeof text, format, list);
    va_end(list);
    if (length > 0 && (size_t)length < sizeof text)
        put(buffer, text, (size_t)length);
    else
        buffer->failed = 1;
}

/* --- base64 --- */

static const char base64_digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

static void put_base64(struct buffer *buffer, const void *data, size_t length) {
    const unsigned char *from = data;
    char *to = reserve(buffer, (length + 2) / 3 * 4 + 2);
    if (!to)
        return;
    *to++ = '"';
    for (; length; from += 3) {
        size_t some = length < 3 ? length : 3;
        unsigned bits = (unsigned)from[0] << 16;
        if (some > 1) bits |= (unsigned)from[1] << 8;
        if (some > 2) bits |= from[2];
        *to++ = base64_digits[bits >> 18];
        *to++ = base64_digits[bits >> 12 & 63];
        *to++ = some > 1 ? base64_digits[bits >> 6 & 63] : '=';
        *to++ = some > 2 ? base64_digits[bits & 63] : '=';
        length -= some;
    }
    *to++ = '"';
    buffer->length = (size_t)(to - buffer->data);
}

/* Appends what `text` stands for; 0 if it is not base64. */
static int get_base64(struct buffer *buffer, const char *text) {
    size_t length = strlen(text), padding = 0;
    if (length % 4)
        return 0;
    while (padding < 2 && length > padding && text[length - 1 - padding] == '=')
        padding++;
    char *to = length ? reserve(buffer, length / 4 * 3) : NULL;
    if (!to)
        return !length;
    for (size_t i = 0; i < length; i += 4) {
        unsigned bits = 0;
        for (size_t j = i; j < i + 4; j++) {
            const char *digit = j >= length - padding ? base64_digits : strchr(base64_digits, text[j]);
            if (!digit)
                return 0;
            bits = bits << 6 | (unsigned)(digit - base64_digits);
        }
        *to++ = (char)(bits >> 16);
        *to++ = (char)(bits >> 8);
        *to++ = (char)bits;
    }
    buffer->length += length / 4 * 3 - padding;
    return 1;
}

/* --- writing --- */

/* Length of the well-formed UTF-8 sequence at `text`, 0 if there is none. */
static int utf8_length(const unsigned char *text) {
    if (text[0] < 0x80)
        return 1;
    int length = text[0] >= 0xf0 ? 4 : text[0] >= 0xe0 ? 3 : 2;
    if (text[0] < 0xc2 || text[0] > 0xf4)
        return 0;
    for (int i = 1; i < length; i++)
        if ((text[i] & 0xc0) != 0x80)
            return 0;
    /* Overlong forms, surrogates, and what is beyond U+10FFFF. */
    if ((text[0] == 0xe0 && text[1] < 0xa0) || (text[0] == 0xed && text[1] > 0x9f)
        || (text[0] == 0xf0 && text[1] < 0x90) || (text[0] == 0xf4 && text[1] > 0x8f))
        return 0;
    return length;
}

static void put_string(struct buffer *buffer, const char *text) {
    put(buffer, "\"", 1);
    for (const unsigned char *at = (const unsigned char *)text; *at;) {
        int length = utf8_length(at);
        if (!length) {
            put(buffer, "\xef\xbf\xbd", 3);
            length = 1;
        } else if (*at < 0x20 || *at == 0x7f || *at == '"' || *at == '\\') {
            print(buffer, "\\u%04x", *at);
        } else {
            put(buffer, at, (size_t)length);
        }
        at += length;
    }
    put(buffer, "\"", 1);
}

static void put_member(struct buffer *buffer, const char *name, const char *text) {
    print(buffer, "\"%s\": ", name);
    put_string(buffer, text);
}

/* A comma, unless `from` is where the list began. */
static void separate(struct buffer *buffer, size_t from) {
    if (buffer->length > from)
        put(buffer, ", ", 2);
}

/* --- reading --- */

static int bad(const char *error) {
    if (!json.error)
        json.error = error;
    return 0;
}

static void skip_space(void) {
    while (json.at < json.end && memchr(" \t\r\n", *json.at, 4))
        json.at++;
}

static int hex4(unsigned *value) {
    *value = 0;
    for (int i = 0; i < 4; i++, json.at++) {
        static const char digits[] = "0123456789abcdef";
        const char *digit = json.at < json.end && *json.at ? strchr(digits, tolower((unsigned char)*json.at)) : NULL;
        if (!digit)
            return bad("bad \\u escape");
        *value = *value << 4 | (unsigned)(digit - digits);
    }
    return 1;
}

static char *put_utf8(char *to, unsigned code) {
    if (code < 0x80) {
        *to++ = (char)code;
    } else if (code < 0x800) {
        *to++ = (char)(0xc0 | code >> 6);
        *to++ = (char)(0x80 | (code & 63));
    } else if (code < 0x10000) {
        *to++ = (char)(0xe0 | code >> 12);
        *to++ = (char)(0x80 | (code >> 6 & 63));
        *to++ = (char)(0x80 | (code & 63));
    } else {
        *to++ = (char)(0xf0 | code >> 18);
        *to++ = (char)(0x80 | (code >> 12 & 63));
        *to++ = (char)(0x80 | (code >> 6 & 63));
        *to++ = (char)(0x80 | (code & 63));
    }
    return to;
}

/* The string whose opening quote is passed, decoded in place: no escape is shorter than what it stands for. */
static const char *read_string(void) {
    char *start = json.at, *to = start;
    for (;;) {
        if (json.at >= json.end)
            return bad("a string does not end"), NULL;
        char c = *json.at++;
        if (c == '"')
            break;
        if ((unsigned char)c < 0x20)
            return bad("control character in a string"), NULL;
        if (c != '\\') {
            *to++ = c;
            continue;
        }
        if (json.at >= json.end)
            return bad("a string does not end"), NULL;
        static const char letters[] = "\"\\/bfnrt", meanings[] = "\"\\/\b\f\n\r\t";
        c = *json.at++;
        const char *letter = c ? strchr(letters, c) : NULL;
        unsigned code, low;
        if (letter) {
            *to++ = meanings[letter - letters];
        } else if (c != 'u') {
            return bad("unknown escape in a string"), NULL;
        } else {
            if (!hex4(&code))
                return NULL;
            if (code >= 0xd800 && code < 0xdc00 && json.end - json.at >= 2 && json.at[0] == '\\' && json.at[1] == 'u') {
                json.at += 2;
                if (!hex4(&low))
                    return NULL;
                if (low < 0xdc00 || low > 0xdfff)
                    return bad("half a surrogate pair in a string"), NULL;
                code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
            }
            if (!code)
                return bad("NUL in a string"), NULL;
            if (code >= 0xd800 && code < 0xe000)
                return bad("half a surrogate pair in a string"), NULL;
            to = put_utf8(to, code);
        }
    }
    *to = 0;                 /* at the closing quote or before it */
    return start;
}

static int read_number(struct node *node) {
    uint64_t value = 0;
    int negative = *json.at == '-', digits = 0, real = 0;
    char *start = json.at += negative;
    for (; json.at < json.end && isdigit((unsigned char)*json.at); json.at++, digits++)
        if (__builtin_mul_overflow(value, 10, &value)
            || __builtin_add_overflow(value, (uint64_t)(*json.at - '0'), &value))
            real = 1;
    if (!digits || (digits > 1 && *start == '0'))
        return bad("not a number");
    if (json.at < json.end && *json.at == '.') {
        real = 1;
        for (digits = 0, json.at++; json.at < json.end && isdigit((unsigned char)*json.at); json.at++)
            digits++;
    }
    if (digits && json.at < json.end && (*json.at == 'e' || *json.at == 'E')) {
        real = 1;
        json.at++;
        if (json.at < json.end && (*json.at == '+' || *json.at == '-'))
            json.at++;
        for (digits = 0; json.at < json.end && isdigit((unsigned char)*json.at); json.at++)
            digits++;
    }
    if (!digits)
        return bad("not a number");
    if (value > INT64_MAX)
        real = 1;
    node->type = real ? REAL : INTEGER;
    node->number = real ? 0 : negative ? -(int64_t)value : (int64_t)value;
    return 1;
}

static int read_value(int depth);

static int read_members(struct node *node, int depth) {
    char close = node->type == OBJECT ? '}' : ']';
    int *link = &node->first;
    json.at++;
    skip_space();
    if (json.at < json.end && *json.at == close) {
        json.at++;
        return 1;
    }
    for (;;) {
        const char *key = NULL;
        skip_space();
        if (node->type == OBJECT) {
            if (json.at >= json.end || *json.at++ != '"')
                return bad("a member without a name");
            if (!(key = read_string()))
                return 0;
            skip_space();
            if (json.at >= json.end || *json.at++ != ':')
                return bad("no colon after a name");
        }
        int index = read_value(depth + 1);
        if (!index)
            return 0;
        nodes[index].key = key;
        *link = index;
        link = &nodes[index].next;
        skip_space();
        if (json.at >= json.end)
            return bad("the text ends too early");
        char c = *json.at++;
        if (c == close)
            return 1;
        if (c != ',')
            return bad("no comma between values");
    }
}

/* The index of the node of the value that begins here, 0 on an error. */
static int read_value(int depth) {
    static const struct { const char *word; struct node node; } words[] = {
        { "null", { .type = NULL_VALUE } },
        { "false", { .type = BOOLEAN } },
        { "true", { .type = BOOLEAN, .number = 1 } } };
    skip_space();
    if (json.at >= json.end)
        return bad("the text ends too early");
    if (node_count >= NODES || depth > DEPTH)
        return bad("nested too deep, or too many values");
    int index = node_count++;
    struct node *node = &nodes[index];
    *node = (struct node){ 0 };
    switch (*json.at) {
    case '{':
    case '[':
        node->type = *json.at == '{' ? OBJECT : ARRAY;
        return read_members(node, depth) ? index : 0;
    case '"':
        json.at++;
        node->type = STRING;
        return (node->text = read_string()) ? index : 0;
    case '-':
    case '0' ... '9':
        return read_number(node) ? index : 0;
    }
    for (size_t i = 0; i < sizeof words / sizeof *words; i++) {
        size_t length = strlen(words[i].word);
        if ((size_t)(json.end - json.at) >= length && !memcmp(json.at, words[i].word, length)) {
            json.at += length;
            *node = words[i].node;
            return index;
        }
    }
    return bad("not JSON");
}

/* The value that makes up the whole of these bytes, which are changed; NULL, and json.error says why. */
static struct node *read_json(char *text, size_t length) {
    json.at = text;
    json.end = text + length;
    json.error = NULL;
    node_count = 1;
    int index = read_value(0);
    if (index) {
        skip_space();
        if (json.at != json.end)
            index = bad("more than one value in a line");
    }
    return index ? &nodes[index] : NULL;
}

/* --- arguments of a command --- */

static struct node *first_of(const struct node *node) { return node && node->first ? &nodes[node->first] : NULL; }
static struct node *next_of(const struct node *node) { return node->next ? &nodes[node->next] : NULL; }

static struct node *member(const struct node *object, const char *name) {
    if (object && object->type == OBJECT)
        for (struct node *node = first_of(object); node; node = next_of(node))
            if (!strcmp(node->key, name))
                return node;
    return NULL;
}

static struct node *typed_member(const struct node *object, const char *name, enum type type, const char *called) {
    struct node *node = member(object, name);
    if (!node || node->type == type)
        return node;
    fail("Invalid parameter type for '%.60s', expected: %s", name, called);
    return NULL;
}

static const char *string_in(const struct node *object, const char *name) {
    struct node *node = typed_member(object, name, STRING, "string");
    return node ? node->text : NULL;
}

static const char *required_string(const struct node *object, const char *name) {
    const char *text = string_in(object, name);
    if (!text)
        fail("Parameter '%s' is missing", name);
    return text;
}

static int64_t number_in(const struct node *object, const char *name, int64_t otherwise, int64_t least, int64_t most) {
    struct node *node = typed_member(object, name, INTEGER, "integer");
    if (!node)
        return otherwise;
    if (node->number >= least && node->number <= most)
        return node->number;
    fail("Parameter '%s' must be from %lld to %lld", name, (long long)least, (long long)most);
    return otherwise;
}

static int64_t required_number(const struct node *object, const char *name) {
    if (!member(object, name))
        fail("Parameter '%s' is missing", name);
    return number_in(object, name, 0, INT64_MIN, INT64_MAX);
}

static int flag_in(const struct node *object, const char *name, int otherwise) {
    struct node *node = typed_member(object, name, BOOLEAN, "boolean");
    return node ? (int)node->number : otherwise;
}
