/* What every process of the broker does, in C with nothing but libc: a second description of PROTOCOL.md, whose numbers
 * stand beside what they ask for. Each program here includes it, and adds its own part.
 *
 * Rules:
 * - What cannot be done ends the program with a sentence (`die`), and the kernel lets go of all that it held: whoever
 *   buries it gives its tasks back. A program that is to go on catches what it can where it calls.
 * - A `char *` that is returned is the caller's to free. These programs are short, and say where they do not.
 * - All here is `static inline`, so that no compiler wonders at what a program does not use.
 */
#ifndef NAMEDPIPE_H
#define NAMEDPIPE_H

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <poll.h>
#include <regex.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define DEEPEST 5000 /* how deep JSON may be nested: further than Python can, and not as far as a stack ends */

static char *pipes, *registry, *queue; /* where PIPES, REGISTRY and QUEUE are */
static char *reply;                    /* the name of our reply pipe */
static char *worker_id;

struct reader { /* a FIFO of ours, and what has come and is no whole frame yet */
    char name[128];
    int descriptor;
    size_t length;
    unsigned char bytes[1 << 17];
};

static inline void die(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fprintf(stderr, "\n");
    exit(1);
}

static inline char *text_of(const char *format, ...) /* as asprintf */
{
    va_list arguments;
    char *text;
    va_start(arguments, format);
    if (vasprintf(&text, format, arguments) < 0)
        die("out of memory");
    va_end(arguments);
    return text;
}

static inline void new_hex(char hex[33]) /* {hex} */
{
    unsigned char bytes[16];
    int random = open("/dev/urandom", O_RDONLY);
    if (random < 0 || read(random, bytes, 16) != 16)
        die("/dev/urandom: %s", strerror(errno));
    close(random);
    for (int i = 0; i < 16; i++)
        sprintf(hex + 2 * i, "%02x", bytes[i]);
}

static inline long long now(void) /* in nanoseconds since the epoch */
{
    struct timespec time;
    clock_gettime(CLOCK_REALTIME, &time);
    return time.tv_sec * 1000000000LL + time.tv_nsec;
}

static inline char *one_line(char *json) /* a line may end between the parts of JSON, and in none */
{
    for (char *at = json; (at = strpbrk(at, "\r\n"));)
        *at = ' ';
    return json;
}

/* JSON, as far as a frame needs it: where the value of a field begins and ends, and texts. */

static inline const char *blank(const char *at)
{
    return at + strspn(at, " \t\r\n");
}

static inline int utf8_size(const char *text) /* of the character that begins here, in bytes; 0: it is none */
{
    const unsigned char *at = (const unsigned char *)text;
    int size = *at < 0x80 ? 1 : *at < 0xC2 ? 0 : *at < 0xE0 ? 2 : *at < 0xF0 ? 3 : *at < 0xF5 ? 4 : 0;
    for (int i = 1; i < size; i++)
        if (at[i] >> 6 != 2)
            return 0;
    if ((*at == 0xE0 && at[1] < 0xA0) || (*at == 0xF0 && at[1] < 0x90)) /* longer than it must be */
        return 0;
    if ((*at == 0xED && at[1] > 0x9F) || (*at == 0xF4 && at[1] > 0x8F)) /* half of a pair; beyond the last */
        return 0;
    return size;
}

static inline const char *skip_text(const char *at) /* a JSON text; to what follows it. NULL: it is none */
{
    if (*at++ != '"')
        return NULL;
    for (int size; *at != '"'; at += size) {
        if ((unsigned char)*at < 0x20 || !(size = utf8_size(at)))
            return NULL;
        if (*at != '\\')
            continue;
        if (*++at == 'u' && strspn(at + 1, "0123456789abcdefABCDEF") >= 4)
            at += 4;
        else if (!*at || !strchr("\"\\/bfnrt", *at))
            return NULL;
    }
    return at + 1;
}

static inline const char *skip_number(const char *at) /* to what follows it. NULL: it is none */
{
    const char *digit = "0123456789";
    size_t digits;
    at += *at == '-';
    if (!(digits = strspn(at, digit)) || (*at == '0' && digits > 1))
        return NULL;
    at += digits;
    if (*at == '.') {
        if (!(digits = strspn(at + 1, digit)))
            return NULL;
        at += 1 + digits;
    }
    if (*at == 'e' || *at == 'E') {
        at += at[1] == '+' || at[1] == '-' ? 2 : 1;
        if (!(digits = strspn(at, digit)))
            return NULL;
        at += digits;
    }
    return at;
}

static inline const char *skip_value(const char *at, int depth) /* any JSON; to what follows it. NULL: it is none */
{
    static const char *words[] = {"true", "false", "null", "NaN", "Infinity", "-Infinity"};
    if (*at == '"')
        return skip_text(at);
    if (*at == '{' || *at == '[') {
        char open = *at, close = open == '{' ? '}' : ']';
        for (at = blank(at + 1); *at != close; at = blank(at + 1)) {
            if (open == '{' && (!(at = skip_text(at)) || *(at = blank(at)) != ':'))
                return NULL;
            if (depth > DEEPEST || !(at = skip_value(blank(at + (open == '{')), depth + 1)))
                return NULL;
            if (*(at = blank(at)) == close)
                return at + 1;
            if (*at != ',' || *blank(at + 1) == close)
                return NULL;
        }
        return at + 1;
    }
    for (size_t i = 0; i < sizeof words / sizeof *words; i++)
        if (!strncmp(at, words[i], strlen(words[i])))
            return at + strlen(words[i]);
    return skip_number(at);
}

static inline char *utf8(char *to, unsigned long code)
{
    if (code < 0x80)
        return *to++ = code, to;
    int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    *to++ = (0xFF00 >> (more + 1) & 0xFF) | code >> 6 * more;
    while (more--)
        *to++ = 0x80 | (code >> 6 * more & 0x3F);
    return to;
}

static inline char *plain(char *json) /* what a JSON text says, in UTF-8; NULL if it is none. Frees it */
{
    const char *plainly = "\"\\/bfnrt", *meant = "\"\\/\b\f\n\r\t", *found, *at = json;
    char *text = json && *json == '"' && skip_text(json) ? malloc(strlen(json) + 1) : NULL, *to = text;
    while (text && *++at != '"') {
        unsigned code, low = 0;
        if (*at != '\\') {
            *to++ = *at;
        } else if (*++at == 'u') {
            sscanf(at + 1, "%4x", &code);
            at += 4;
            if (code >> 10 == 0x36 && sscanf(at + 1, "\\u%4x", &low) == 1 && low >> 10 == 0x37) {
                at += 6; /* a pair */
                code = 0x10000 + ((code & 0x3FF) << 10) + (low & 0x3FF);
            }
            if (!code) /* what C's texts have no room for */
                free(text), text = NULL;
            else
                to = utf8(to, code);
        } else if ((found = strchr(plainly, *at))) {
            *to++ = meant[found - plainly];
        }
    }
    if (text)
        *to = 0;
    free(json);
    return text;
}

static inline int is_object(const char *message)
{
    const char *at = blank(message), *end = *at == '{' ? skip_value(at, 0) : NULL;
    return end && !*blank(end);
}

/* the JSON of a field; NULL: it is missing (F4), or this is no object */
static inline char *field(const char *object, const char *key)
{
    const char *at, *found = NULL, *found_end = NULL;
    if (!is_object(object))
        return NULL;
    for (at = blank(blank(object) + 1); *at == '"'; at = blank(at + 1)) {
        char name[64] = "", *text;
        const char *value = blank(1 + blank(skip_text(at)));
        if ((text = plain(strndup(at, skip_text(at) - at))))
            snprintf(name, sizeof name, "%s", text);
        free(text);
        at = skip_value(value, 0);
        if (!strcmp(name, key))
            found = value, found_end = at; /* the last of two, as Python has it */
        if (*(at = blank(at)) != ',')
            break;
    }
    return found ? strndup(found, found_end - found) : NULL;
}

/* what stands last in a message that cannot be parsed, as an object: who sent it (F5). NULL: it does not say */
static inline char *envelope(const char *message)
{
    const char *last = "[,{]([ \t\r\n]*\"(no_reply|reply_to|correlation_id|dressed)\"[ \t\r\n]*:"
                       "[ \t\r\n]*(true|false|null|\"[^\"\\]*\")[ \t\r\n]*[,}])+[ \t\r\n]*$";
    size_t length = strlen(message);
    regex_t pattern;
    regmatch_t found;
    if (length > 400) /* it is no longer, and this may be large */
        message += length - 400;
    if (regcomp(&pattern, last, REG_EXTENDED))
        die("out of memory");
    int is_there = !regexec(&pattern, message, 1, &found, 0);
    regfree(&pattern);
    return is_there ? text_of("{%s", message + found.rm_so + 1) : NULL;
}

/* Files */

static inline void write_file(const char *path, const char *text, int durable) /* T2 without the name */
{
    int file = open(path, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW, 0600); /* D6 */
    size_t length = strlen(text);
    for (size_t done = 0; file >= 0 && done < length;) {
        ssize_t wrote = write(file, text + done, length - done);
        if (wrote < 0)
            die("%s: %s", path, strerror(errno));
        done += wrote;
    }
    if (file < 0 || (durable && fsync(file)) || close(file))
        die("%s: %s", path, strerror(errno));
}

/* a file appears when it is whole (D4) */
static inline void put(const char *directory, const char *name, const char *text)
{
    char hex[33];
    new_hex(hex);
    char *draft = text_of("%s/.%s.%s", directory, name, hex), *path = text_of("%s/%s", directory, name);
    write_file(draft, text, 0);
    if (rename(draft, path))
        die("%s: %s", path, strerror(errno));
    free(draft), free(path);
}

static inline char *read_file(const char *path) /* NULL: it cannot be read */
{
    struct stat status;
    int file = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK);
    char *text = NULL;
    if (file >= 0 && !fstat(file, &status) && S_ISREG(status.st_mode) && (text = calloc(1, status.st_size + 1)))
        for (off_t done = 0; done < status.st_size;) {
            ssize_t got = read(file, text + done, status.st_size - done);
            if (got <= 0)
                break;
            done += got;
        }
    for (off_t at = 0; text && at < status.st_size; at++)
        if (!text[at]) /* C's texts end here, and the file does not */
            text[at] = 1; /* which JSON forbids as well (F2) */
    if (file >= 0)
        close(file);
    return text;
}

static inline void find_directories(const char *config)
{
    char target[PATH_MAX] = "", owner[PATH_MAX] = "", hex[33], *real = realpath(config, NULL);
    struct stat status;
    signal(SIGPIPE, SIG_IGN); /* P5 */
    if (!real)
        die("%s: %s", config, strerror(errno));
    registry = text_of("%s/pipes", real);
    queue = text_of("%s/coordinator", real);
    char *link = text_of("%s/directory", registry);
    if (readlink(link, target, sizeof target - 1) < 0) /* D1 */
        die("no broker has run in %s: start its coordinator", real);
    pipes = text_of("%s", target);
    char *mark = text_of("%s/.config", pipes), *path = text_of("%s/format", queue);
    if (lstat(pipes, &status) || !S_ISDIR(status.st_mode) || status.st_uid != geteuid() || status.st_mode & 077 ||
        readlink(mark, owner, sizeof owner - 1) < 0 || strcmp(owner, real)) /* D2 */
        die("%s is not for %s", pipes, real);
    char *said = read_file(path), *format = said ? field(said, "format") : NULL;
    if (!format || strcmp(format, "1")) /* D7 */
        die("%s has format %s, and this program knows 1", queue, format ? format : "?");
    free(real), free(link), free(mark), free(path), free(said), free(format);
    new_hex(hex);
    reply = text_of("reply_%d_%s", (int)getpid(), hex); /* P2 */
}

/* Pipes */

static inline void read_from(struct reader *reader, const char *name)
{
    char hex[33];
    new_hex(hex);
    char *draft = text_of("%s/.%s.%s", pipes, name, hex), *path = text_of("%s/%s", pipes, name);
    snprintf(reader->name, sizeof reader->name, "%s", name);
    reader->length = 0;
    if (mkfifo(draft, 0600) || (reader->descriptor = open(draft, O_RDONLY | O_NONBLOCK | O_CLOEXEC)) < 0 ||
        open(draft, O_WRONLY | O_NONBLOCK | O_CLOEXEC) < 0 /* P4: to our end */ || rename(draft, path)) /* P3 */
        die("%s: %s", path, strerror(errno));
    free(draft), free(path);
}

static inline int tell(const char *name, const char *text) /* write a message into a pipe; 0, or what errno says */
{
    char hex[33], *body = NULL, *check = NULL;
    size_t length = strlen(text);
    unsigned char frame[PIPE_BUF];
    struct stat status;
    char *path = text_of("%s/%s", pipes, name);
    int pipe = open(path, O_WRONLY | O_NONBLOCK | O_NOFOLLOW | O_CLOEXEC), problem = pipe < 0 ? errno : 0;
    free(path);
    if (problem)
        return problem;
    if (fstat(pipe, &status) || !S_ISFIFO(status.st_mode) || status.st_uid != geteuid()) /* P5 */
        return close(pipe), ENXIO;
    if (length + 4 > sizeof frame) { /* M1 */
        new_hex(hex);
        body = text_of("body_%s.%s", name, hex);
        put(pipes, body, text);
        text = check = text_of("{\"body_file\":\"%s\"}", body);
        length = strlen(text);
    }
    for (int i = 0; i < 4; i++)
        frame[i] = length >> (24 - 8 * i);
    memcpy(frame + 4, text, length);
    if (write(pipe, frame, length + 4) < 0) { /* F1: all or nothing */
        problem = errno;
        if (body) {
            path = text_of("%s/%s", pipes, body);
            unlink(path);
            free(path);
        }
    }
    close(pipe);
    free(body), free(check);
    return problem;
}

static inline int is_hex(const char *text) /* {hex} */
{
    return strlen(text) == 32 && strspn(text, "0123456789abcdef") == 32;
}

static inline char *take_body(struct reader *reader, const char *name) /* M2; NULL: it is none for this pipe, or gone */
{
    size_t length = strlen(reader->name);
    if (strncmp(name, "body_", 5) || strncmp(name + 5, reader->name, length) || name[5 + length] != '.' ||
        !is_hex(name + 6 + length))
        return NULL;
    char *path = text_of("%s/%s", pipes, name), *message = read_file(path);
    if (message && unlink(path)) /* or it would be found again and again */
        free(message), message = NULL;
    free(path);
    return message;
}

static inline char *next_body(struct reader *reader) /* M4: one that lies there, rung for or not; NULL: there is none */
{
    DIR *directory = opendir(pipes);
    char *message = NULL;
    for (struct dirent *found; directory && !message && (found = readdir(directory));)
        message = take_body(reader, found->d_name);
    if (directory)
        closedir(directory);
    return message;
}

static inline int is_time_to_look(void) /* M4: whether ten seconds have gone, and another ten begin */
{
    static time_t looked;
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    if (time.tv_sec - looked < 10)
        return 0;
    looked = time.tv_sec;
    return 1;
}

static inline char *unpack(struct reader *reader, char *text) /* M1 to M3; frees it where the message is another */
{
    if (strncmp(text, "{\"body_file\":", 13))
        return text;
    char *name = plain(field(text, "body_file")), *message = name ? take_body(reader, name) : NULL;
    free(text), free(name);
    return message;
}

static int over[2]; /* a pipe: whoever is told to end finds a byte in it (a flag could be set just before `poll`) */

static inline void end(int number)
{
    (void)number;
    if (write(over[1], "!", 1) < 0)
        _exit(1);
}

static inline void end_by_signals(void)
{
    struct sigaction action = {.sa_handler = end, .sa_flags = SA_RESTART};
    if (pipe(over))
        die("pipe: %s", strerror(errno));
    sigaction(SIGTERM, &action, NULL);
    sigaction(SIGINT, &action, NULL);
}

static inline int is_over(void)
{
    struct pollfd told = {over[0], POLLIN, 0};
    return over[0] && poll(&told, 1, 0) > 0;
}

/* the next message; NULL if none comes in time, or we are told to end */
static inline char *next(struct reader *reader, int milliseconds)
{
    for (;;) {
        while (reader->length >= 6) {
            unsigned char *b = reader->bytes;
            size_t length = (size_t)b[0] << 24 | b[1] << 16 | b[2] << 8 | b[3], used = length + 4;
            int is_frame = length >= 2 && used <= PIPE_BUF && b[4] == '{'; /* F1, F2 */
            if (is_frame && used > reader->length && !memchr(b + 4, 0, reader->length - 4))
                break;
            char *text = is_frame && used <= reader->length && !memchr(b + 4, 0, length) ? strndup((char *)b + 4, length) : NULL;
            if (!text) { /* F3: to the next zero byte */
                unsigned char *zero = memchr(b + 1, 0, reader->length - 1);
                used = zero ? (size_t)(zero - b) : reader->length;
            }
            memmove(b, b + used, reader->length -= used);
            if (text && (text = unpack(reader, text)))
                return text;
        }
        struct pollfd ready[] = {{reader->descriptor, POLLIN, 0}, {over[0], POLLIN, 0}};
        if (poll(ready, over[0] ? 2 : 1, milliseconds) <= 0 || !ready[0].revents)
            return NULL;
        ssize_t got = read(reader->descriptor, reader->bytes + reader->length, sizeof reader->bytes - reader->length);
        if (got > 0)
            reader->length += got;
    }
}

/* A worker's life */

static inline void lock_id(void) /* L1, L2 */
{
    char hex[33];
    new_hex(hex);
    worker_id = text_of("c-%d-%.12s", (int)getpid(), hex); /* L3: nobody has used it */
    char *home = text_of("%s/claimed/%s", queue, worker_id), *lock = text_of("%s/lock", home);
    char *draft = text_of("%s/claimed/.%s.%s", queue, worker_id, hex);
    int file = open(draft, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (file < 0 || flock(file, LOCK_EX | LOCK_NB))
        die("%s: %s", draft, strerror(errno));
    int problem;
    do
        if (mkdir(home, 0700) && errno != EEXIST)
            die("%s: %s", home, strerror(errno));
    while ((problem = link(draft, lock) ? errno : 0) == ENOENT); /* it was empty, and has been removed meanwhile */
    unlink(draft); /* the descriptor stays open: its end is our death */
    if (problem)
        die("%s: %s", lock, strerror(problem));
    free(home), free(lock), free(draft);
}

/* L4, once the lock is held and the pipes are read; what it subscribes to as fields that begin with ',' */
static inline void come(const char *subscriptions)
{
    char *name = text_of("worker_%s.json", worker_id);
    char *entry = text_of("{\"worker_id\":\"%s\",\"pid\":%d,\"since\":%lld,\"reply\":\"%s\"%s}", worker_id, (int)getpid(),
                          now() / 1000000000, reply, subscriptions);
    char *frame = text_of("{\"type\":\"register\",\"worker\":\"%s\"}", worker_id);
    put(registry, name, entry);
    tell("coordinator_tasks", frame); /* P6 */
    free(name), free(entry), free(frame);
}

static inline void leave(const char *pipe) /* L6: so that nobody has to bury us */
{
    char *left[] = {
        text_of("%s/worker_%s.json", registry, worker_id),
        text_of("%s/%s", pipes, pipe),
        text_of("%s/claimed/%s/lock", queue, worker_id),
        text_of("%s/%s", pipes, reply),
    };
    char *home = text_of("%s/claimed/%s", queue, worker_id);
    char *frame = text_of("{\"type\":\"register\",\"worker\":\"%s\"}", worker_id);
    unlink(left[0]);
    tell("coordinator_tasks", frame); /* there is no entry now */
    free(frame);
    for (size_t i = 0; i < sizeof left / sizeof *left; i++)
        unlink(left[i]), free(left[i]);
    rmdir(home), free(home);
}

static inline void answer(const char *message, const char *kind, const char *value) /* A1 */
{
    char *sender = is_object(message) ? NULL : envelope(message);
    message = sender ? sender : message;
    char *to = plain(field(message, "reply_to")), *id = field(message, "correlation_id"), hex[33];
    int digits = to && !strncmp(to, "reply_", 6) ? strspn(to + 6, "0123456789") : 0;
    int is_pipe = digits && digits < 20 && to[6 + digits] == '_' && is_hex(to + 7 + digits);
    char *no_reply = field(message, "no_reply"), *dressed = field(message, "dressed");
    if (is_pipe && !(no_reply && !strcmp(no_reply, "true"))) {
        int is_dressed = dressed && !strcmp(dressed, "true"); /* F6: what comes back is as it came */
        char *text = text_of("{\"%s\":%s,\"correlation_id\":%s%s}", kind, value, id ? id : "null", is_dressed ? ",\"dressed\":true" : "");
        int problem = tell(to, text);
        if (problem == EPIPE)
            problem = tell(to, text); /* its reader may have made it anew */
        if (problem && problem != ENXIO && problem != EPIPE) { /* A3: full, or its name is gone: on the disk */
            new_hex(hex);
            char *body = text_of("body_%s.%s", to, hex);
            put(pipes, body, text);
            free(body);
        }
        free(text);
    }
    free(sender), free(to), free(id), free(no_reply), free(dressed);
}

#endif
